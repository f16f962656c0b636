//! Publishing over TLS, to a broker whose certificate is from an authority that only `SSL_CERT_FILE` names.

use crate::support::wire::Tap;
use crate::support::{Lab, Process, folder};
use oncebox::node::RabbitOptions;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An authority and a certificate for `localhost`, and for nothing else.
struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    fn make() -> Self {
        let made = Self { dir: folder("certificates") };
        std::fs::write(made.path("extensions"), "subjectAltName = DNS:localhost\nextendedKeyUsage = serverAuth\n")
            .unwrap();
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"];
        let authority = ["req", "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"];
        made.openssl(&[&authority[..], &key].concat());
        let asked = ["req", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"];
        made.openssl(&[&asked[..], &key].concat());
        let signed =
            ["x509", "-req", "-days", "2", "-in", "server.csr", "-out", "server.pem", "-extfile", "extensions"];
        made.openssl(&[&signed[..], &["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]].concat());
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn openssl(&self, args: &[&str]) {
        let made = Command::new("openssl").args(args).current_dir(&self.dir).output().expect("openssl is installed");
        assert!(made.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&made.stderr));
    }
}

/// A port that is free now: below those the kernel gives to clients, above those the other private servers take.
fn free_port() -> u16 {
    (32_000..32_700).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

fn relay(lab: &Lab, url: &str, trusted: Option<&Path>) -> Process {
    let mut command = lab.command(&["relay"]);
    command.env("ONCEBOX_AMQP_URL", url).env_remove("SSL_CERT_FILE").env_remove("SSL_CERT_DIR");
    if let Some(file) = trusted {
        command.env("SSL_CERT_FILE", file);
    }
    Process::spawn(command)
}

/// Goal: over TLS everything arrives, small and large; a broker of an unknown authority or of another name is not spoken
/// to, and the log says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_publishes_over_tls_to_whom_it_trusts() {
    let (certificates, port) = (Certificates::make(), free_port());
    let file = |name: &str| certificates.path(name).display().to_string();
    let config = vec![
        format!("listeners.ssl.1 = 127.0.0.1:{port}"),
        format!("ssl_options.cacertfile = {}", file("ca.pem")),
        format!("ssl_options.certfile = {}", file("server.pem")),
        format!("ssl_options.keyfile = {}", file("server.key")),
        "ssl_options.verify = verify_none".to_owned(),
    ];
    let lab = Lab::with_rabbit(RabbitOptions { config, ..RabbitOptions::default() }).await;
    let tap = Tap::on(&lab).await;
    lab.sql("select oncebox.publish('order.placed', jsonb_build_object('n', i)) from generate_series(1, 300) as i")
        .await;
    lab.sql("select oncebox.publish('order.large', jsonb_build_object('x', repeat('x', 400000))) from generate_series(1, 5)")
        .await;
    let url = |host: &str| format!("amqps://guest:guest@{host}:{port}/{}", lab.name);
    let ca = certificates.path("ca.pem");
    for (host, trusted, why) in
        [("localhost", None, "UnknownIssuer"), ("127.0.0.1", Some(ca.as_path()), "NotValidForName")]
    {
        let refused = relay(&lab, &url(host), trusted);
        refused.wait_for_log("no session with the broker").await;
        assert!(refused.log().contains(why) || refused.log().contains("not valid for"), "{}", refused.log());
        assert!(!refused.log().contains("guest:guest"), "{}", refused.log());
        drop(refused);
        // How long a take-over takes is another test's matter.
        lab.sql("update oncebox.outbox_lease set expires_at = '-infinity'").await;
    }
    assert_eq!(tap.depth().await, 0);
    let relay = relay(&lab, &url("localhost"), Some(&ca));
    let wire = tap.read(305).await;
    assert_eq!((wire.deliveries.len(), wire.duplicates()), (305, 0), "{}", relay.log());
    let large = wire.deliveries.iter().filter(|delivery| delivery.topic == "order.large");
    assert!(large.clone().all(|delivery| delivery.body.len() > 400_000) && large.count() == 5);
}
