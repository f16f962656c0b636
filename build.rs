//! Cargo does not see new files behind the macro that embeds the migrations.
fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
