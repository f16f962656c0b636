//! The report as one HTML page with SVG inside: no scripts, no other files. Pure.

use super::figure::{Figure, Figures, Role};
use super::report::{Measurement, Plot, Report};
use super::svg::{self, escape};
use super::table::{headers, ratios, row};

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#fff}
h1,h2,h3{line-height:1.2}h2{border-top:1px solid #d5dce3;padding-top:1.5rem;margin-top:2.5rem}
table{border-collapse:collapse;margin:.5rem 0;font-size:13px;display:block;overflow-x:auto}
th,td{border:1px solid #d5dce3;padding:.25rem .5rem;text-align:right;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}th{background:#f2f5f8;font-weight:600}
.facts{color:#56636f;font-size:13px}.warning{background:#fff3d6;border-left:4px solid #e0a100;padding:.5rem 1rem}
svg{max-width:100%;height:auto;display:block;margin:1rem 0}svg text{font:12px system-ui,sans-serif;fill:#1c2733}
svg .quiet{fill:#56636f}
";

/// The whole page.
pub(super) fn render(report: &Report) -> String {
    let title = match &report.measurements[..] {
        [one] => format!("oncebox bench {}", one.name),
        _ => "oncebox bench".to_owned(),
    };
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width\"/>\n<title>{0}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n<h1>{0}</h1>\n",
        escape(&title)
    );
    page.push_str(&format!(
        "<p class=\"facts\">oncebox {}, {}, each figure measured {} time(s), sides in turn.<br/>\n",
        escape(&report.version),
        escape(&report.date),
        report.runs
    ));
    let facts: Vec<String> =
        report.machine.iter().map(|fact| format!("{}: {}", escape(&fact.name), escape(&fact.value))).collect();
    page.push_str(&format!("{}</p>\n", facts.join(" · ")));
    for warning in &report.warnings {
        page.push_str(&format!("<p class=\"warning\">{}</p>\n", escape(warning)));
    }
    for measurement in &report.measurements {
        page.push_str(&measured(measurement));
    }
    page.push_str(
        "<p class=\"facts\">Bars are medians, the thin line spans the runs. A ratio is the median of the ratios of each run. \
         CPU is in seconds for 100,000 messages, user and system; a dash is what was not measured.</p>\n</body>\n</html>\n",
    );
    page
}

fn measured(measurement: &Measurement) -> String {
    let mut html = format!("<h2>{}: {}</h2>\n", escape(&measurement.name), escape(&measurement.title));
    let settings: Vec<String> =
        measurement.settings.iter().map(|fact| format!("{}: {}", escape(&fact.name), escape(&fact.value))).collect();
    html.push_str(&format!("<p class=\"facts\">{}</p>\n", settings.join(" · ")));
    for section in &measurement.sections {
        html.push_str(&format!("<h3>{}</h3>\n", escape(&section.title)));
        html.push_str(&svg::bars(&bars(section)));
        let cpu = cpu_bars(section);
        if !cpu.bars.is_empty() {
            html.push_str(&svg::bars(&cpu));
        }
        let histograms: Vec<&Figure> = section.figures.iter().filter(|figure| figure.latency_ms.is_some()).collect();
        if !histograms.is_empty() {
            html.push_str(&svg::histogram(&section.unit, &histograms));
        }
        html.push_str(&table(section));
    }
    for plot in &measurement.plots {
        html.push_str(&format!("<h3>{}</h3>\n{}", escape(&plot.title), lines(plot)));
    }
    if !measurement.notes.is_empty() {
        let notes: Vec<String> = measurement.notes.iter().map(|note| format!("<li>{}</li>", escape(note))).collect();
        html.push_str(&format!("<ul>{}</ul>\n", notes.join("\n")));
    }
    html
}

fn lines(plot: &Plot) -> String {
    svg::lines(plot)
}

fn table(section: &Figures) -> String {
    let cells = |tag: &str, cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{}</tr>\n", cells.concat())
    };
    let rows: Vec<String> = section.figures.iter().map(|figure| cells("td", row(section, figure))).collect();
    format!("<table>\n{}{}</table>\n", cells("th", headers(section)), rows.concat())
}

fn bars(section: &Figures) -> svg::Bars {
    let unit = if section.figures.iter().any(|figure| figure.latency_ms.is_some()) {
        format!("p99, {}", section.unit)
    } else {
        section.unit.clone()
    };
    let bar = |figure: &Figure| svg::Bar {
        name: figure.name.clone(),
        parts: vec![(figure.median, color(figure.role))],
        range: Some((figure.min, figure.max)),
        note: Some(ratios(figure)).filter(|note| !note.is_empty()),
    };
    svg::Bars { unit, legend: Vec::new(), bars: section.figures.iter().map(bar).collect() }
}

/// Stacked: what each of the processes takes.
fn cpu_bars(section: &Figures) -> svg::Bars {
    let legend = [("this process", "#3b6ea8"), ("Postgres", "#7d57a6"), ("broker", "#d98a2b")];
    let bar = |figure: &Figure| {
        let cpu = figure.cpu_s_per_100k;
        let seconds = [cpu.client, cpu.postgres, cpu.broker];
        let parts = seconds.iter().zip(legend).filter_map(|(s, (_, color))| Some(((*s)?, color)));
        svg::Bar { name: figure.name.clone(), parts: parts.collect(), range: None, note: None }
    };
    let bars: Vec<svg::Bar> = section.figures.iter().map(bar).filter(|bar| !bar.parts.is_empty()).collect();
    svg::Bars { unit: "CPU-s per 100,000 messages".to_owned(), legend: legend.to_vec(), bars }
}

fn color(role: Role) -> &'static str {
    match role {
        Role::Ceiling => "#9aa7b4",
        Role::Baseline => "#c3a46b",
        Role::Subject => "#2f8f6b",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::sample;

    /// Tags that are open at the end of each prefix must close in order; void tags are written `<x/>`.
    fn assert_well_formed(page: &str) {
        let mut open: Vec<&str> = Vec::new();
        for piece in page.split('<').skip(1) {
            let (tag, _) = piece.split_once('>').unwrap_or_else(|| panic!("<{piece} never ends"));
            if tag.starts_with('!') || tag.ends_with('/') {
                continue;
            }
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name), "{tag}"),
                None => open.push(tag.split_whitespace().next().expect("a name")),
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        }
        assert_eq!(open, Vec::<&str>::new());
    }

    /// Goal: the page is well-formed, shows every figure and plot, and asks for nothing from elsewhere.
    #[test]
    fn the_page_stands_alone() {
        let page = render(&sample());
        assert_well_formed(&page);
        assert!(page.contains("ceiling &amp; co") && !page.contains("& co"), "{page}");
        for word in ["<svg", "lag, s", "0.90 of ceiling", "beware", "a note", "over time", "CPU-s per 100,000"] {
            assert!(page.contains(word), "{word} is not on\n{page}");
        }
        for foreign in ["<script", "http:", "https:", "src=", "@import", "NaN", "inf"] {
            assert!(!page.contains(foreign), "{foreign} is on\n{page}");
        }
    }
}
