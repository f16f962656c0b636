//! The report as a text for terminals. Pure.

use super::figure::{Better, Figure, Figures, Role};
use super::report::Report;
use comfy_table::{CellAlignment, Table};

/// Stands for what was not measured.
const ABSENT: &str = "–";

/// The whole report.
pub(super) fn render(report: &Report) -> String {
    let mut text = format!("oncebox {}, {}, {} run(s) each\n", report.version, report.date, report.runs);
    let facts: Vec<String> = report.machine.iter().map(|fact| format!("{} {}", fact.name, fact.value)).collect();
    text.push_str(&facts.join("; "));
    for measurement in &report.measurements {
        text.push_str(&format!("\n\n{}: {}\n", measurement.name, measurement.title));
        let settings: Vec<String> =
            measurement.settings.iter().map(|fact| format!("{}: {}", fact.name, fact.value)).collect();
        text.push_str(&settings.join(", "));
        for section in &measurement.sections {
            text.push_str(&format!("\n\n{}\n{}", section.title, figures(section)));
        }
        for note in &measurement.notes {
            text.push_str(&format!("\n* {note}"));
        }
    }
    for warning in &report.warnings {
        text.push_str(&format!("\nWARNING: {warning}"));
    }
    text
}

fn figures(section: &Figures) -> Table {
    let mut table = Table::new();
    let headers = headers(section);
    table.set_header(&headers);
    for figure in &section.figures {
        table.add_row(row(section, figure));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Names of a section's columns; the page has the same.
pub(super) fn headers(section: &Figures) -> Vec<String> {
    let unit = &section.unit;
    let value = if has_latency(section) { format!("p99, {unit}") } else { unit.clone() };
    let better = if section.better == Better::Higher { "more is better" } else { "less is better" };
    let mut headers = vec!["side".to_owned(), format!("{value}, median ({better})"), "each run".to_owned()];
    headers.push("ratio".to_owned());
    if has_latency(section) {
        headers.extend(["p50", "p90", "max"].map(|name| format!("{name}, {unit}")));
    }
    headers.extend(["client", "Postgres", "broker"].map(|name| format!("CPU-s/100k {name}")));
    headers.extend(extras(section));
    headers
}

/// The cells under [`headers`].
pub(super) fn row(section: &Figures, figure: &Figure) -> Vec<String> {
    let some = |value: Option<f64>| value.map_or_else(|| ABSENT.to_owned(), number);
    let each: Vec<String> = figure.runs.iter().copied().map(number).collect();
    let name = match figure.role {
        Role::Ceiling => format!("{} (ceiling)", figure.name),
        Role::Baseline => format!("{} (baseline)", figure.name),
        Role::Subject => figure.name.clone(),
    };
    let mut cells = vec![name, number(figure.median), each.join(" ")];
    cells.push(if figure.ratios.is_empty() { ABSENT.to_owned() } else { ratios(figure) });
    if has_latency(section) {
        let of = |latency: fn(&super::figure::Latency) -> f64| some(figure.latency_ms.as_ref().map(latency));
        cells.extend([of(|latency| latency.p50), of(|latency| latency.p90), of(|latency| latency.max)]);
    }
    let cpu = figure.cpu_s_per_100k;
    cells.extend([cpu.client, cpu.postgres, cpu.broker].map(some));
    cells.extend(extras(section).iter().map(|name| some(figure.extras.get(name).copied())));
    cells
}

/// Ratios with what they are taken to.
pub(super) fn ratios(figure: &Figure) -> String {
    let ratios: Vec<String> = figure.ratios.iter().map(|ratio| format!("{:.2} of {}", ratio.ratio, ratio.to)).collect();
    ratios.join(", ")
}

fn has_latency(section: &Figures) -> bool {
    section.figures.iter().any(|figure| figure.latency_ms.is_some())
}

/// Names of further numbers of any side.
fn extras(section: &Figures) -> Vec<String> {
    let mut names: Vec<String> = section.figures.iter().flat_map(|figure| figure.extras.keys().cloned()).collect();
    names.sort();
    names.dedup();
    names
}

/// Three digits that count, and no fraction beyond a thousand; thousands are set apart.
pub(super) fn number(value: f64) -> String {
    if !value.is_finite() {
        return ABSENT.to_owned();
    }
    let decimals = match value.abs() {
        size if size >= 99.95 || size == 0.0 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.0995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), None), |(w, f)| (w, Some(f)));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |digits| ("-", digits));
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{}", fraction.map(|fraction| format!(".{fraction}")).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::sample;

    /// Goal: numbers are as long as they mean something.
    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (1_234_567.8, "1,234,568"),
            (999.6, "1,000"),
            (100.0, "100"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.0123, "0.012"),
            (0.0, "0"),
            (-1234.0, "-1,234"),
            (f64::NAN, ABSENT),
        ] {
            assert_eq!(number(value), text);
        }
    }

    /// Goal: every figure stands with its ratio and what it is taken to, and warnings are not lost.
    #[test]
    fn the_table_says_it_all() {
        let text = render(&sample());
        for word in [
            "relay",
            "ceiling & co (ceiling)",
            "0.90 of ceiling & co",
            "CPU-s/100k Postgres",
            "p99, ms",
            "lag, s",
            "WARNING: beware",
            "* a note",
            "–",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        for section in &sample().measurements[0].sections {
            for figure in &section.figures {
                assert_eq!(headers(section).len(), row(section, figure).len());
            }
        }
    }
}
