//! Bars, histograms and curves as SVG, made by hand. Pure.

use super::figure::Figure;
use super::report::Plot;
use super::table::number;

const WIDTH: f64 = 1_000.0;
/// Room for the names of bars.
const NAMES: f64 = 260.0;
/// Room for the values beside bars.
const VALUES: f64 = 380.0;
const BAR: f64 = 22.0;
const GAP: f64 = 8.0;
/// Of curves and histograms.
const HEIGHT: f64 = 260.0;
const MARGIN_LEFT: f64 = 80.0;
const MARGIN_BOTTOM: f64 = 40.0;
const COLORS: [&str; 6] = ["#2f8f6b", "#3b6ea8", "#d98a2b", "#7d57a6", "#b5495b", "#56636f"];

/// A group of horizontal bars on one scale from 0.
pub(super) struct Bars {
    pub(super) unit: String,
    /// Names and colors of the parts of bars.
    pub(super) legend: Vec<(&'static str, &'static str)>,
    pub(super) bars: Vec<Bar>,
}

/// A bar of one or more parts, one after the other.
pub(super) struct Bar {
    pub(super) name: String,
    /// Lengths and colors.
    pub(super) parts: Vec<(f64, &'static str)>,
    /// Smallest and largest of the runs.
    pub(super) range: Option<(f64, f64)>,
    pub(super) note: Option<String>,
}

/// Draws bars.
pub(super) fn bars(chart: &Bars) -> String {
    let total = |bar: &Bar| bar.parts.iter().map(|(length, _)| length).filter(|length| length.is_finite()).sum::<f64>();
    let end = |bar: &Bar| total(bar).max(bar.range.map_or(0.0, |(_, max)| finite(max)));
    let longest = chart.bars.iter().map(end).fold(0.0, f64::max);
    let scale = if longest > 0.0 { (WIDTH - NAMES - VALUES) / longest } else { 0.0 };
    let height = 24.0 + chart.bars.len() as f64 * (BAR + GAP);
    let mut body = text(NAMES, 14.0, "start", "quiet", &chart.unit);
    let mut x = NAMES + 220.0;
    for (name, color) in &chart.legend {
        body.push_str(&rect(x, 4.0, 12.0, 12.0, color));
        body.push_str(&text(x + 18.0, 14.0, "start", "quiet", name));
        x += 130.0;
    }
    for (index, bar) in chart.bars.iter().enumerate() {
        let y = 24.0 + index as f64 * (BAR + GAP);
        let middle = y + BAR / 2.0;
        body.push_str(&text(NAMES - 10.0, middle + 4.0, "end", "", &bar.name));
        let mut x = NAMES;
        for (length, color) in &bar.parts {
            let length = finite(*length) * scale;
            body.push_str(&rect(x, y, length, BAR, color));
            x += length;
        }
        if let Some((min, max)) = bar.range {
            let (from, to) = (NAMES + finite(min) * scale, NAMES + finite(max) * scale);
            body.push_str(&format!(
                "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#1c2733\"/>\n"
            ));
        }
        let value = number(total(bar));
        let value = bar.note.as_ref().map_or(value.clone(), |note| format!("{value}  ({note})"));
        body.push_str(&text(NAMES + end(bar) * scale + 8.0, middle + 4.0, "start", "", &value));
    }
    svg(height, &body)
}

/// Draws how the latencies of several sides are spread, on a logarithmic scale.
pub(super) fn histogram(unit: &str, figures: &[&Figure]) -> String {
    let bins = || figures.iter().filter_map(|figure| figure.latency_ms.as_ref()).flat_map(|latency| &latency.histogram);
    let low = bins().map(|bin| bin.up_to_ms).fold(f64::INFINITY, f64::min);
    let high = bins().map(|bin| bin.up_to_ms).fold(0.0, f64::max);
    if !low.is_finite() || high <= 0.0 {
        return String::new();
    }
    let (from, to) = ((low / 1.2).log10(), (high * 1.2).log10());
    let frame = Frame { x: (from, to), y: (0.0, 0.0) };
    let mut curves = Vec::new();
    for figure in figures {
        let Some(latency) = &figure.latency_ms else { continue };
        let share = |count: u64| 100.0 * count as f64 / latency.samples as f64;
        let mut points = vec![(from, 0.0)];
        points.extend(latency.histogram.iter().map(|bin| (bin.up_to_ms.log10(), share(bin.count))));
        curves.push((figure.name.clone(), points));
    }
    let top = curves.iter().flat_map(|(_, points)| points).map(|(_, y)| *y).fold(1.0, f64::max);
    let frame = Frame { y: (0.0, top), ..frame };
    let mut body = String::new();
    for decade in from.floor() as i32..=to.ceil() as i32 {
        for factor in [1.0_f64, 2.0, 5.0] {
            let value = factor * 10_f64.powi(decade);
            if (from..=to).contains(&value.log10()) {
                body.push_str(&frame.tick_x(value.log10(), &number(value)));
            }
        }
    }
    body.push_str(&frame.ticks_y());
    body.push_str(&frame.curves(&curves));
    body.push_str(&text(WIDTH - 10.0, HEIGHT - 4.0, "end", "quiet", &format!("latency, {unit} (logarithmic)")));
    body.push_str(&text(4.0, 12.0, "start", "quiet", "% of samples in each bin"));
    svg(HEIGHT, &body)
}

/// Draws curves, both scales from 0.
pub(super) fn lines(plot: &Plot) -> String {
    let points = || plot.lines.iter().flat_map(|line| &line.points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let right = points().map(|(x, _)| *x).fold(0.0, f64::max);
    let top = points().map(|(_, y)| *y).fold(0.0, f64::max);
    let positive = |value: f64| if value > 0.0 { value } else { 1.0 };
    let frame = Frame { x: (0.0, positive(right)), y: (0.0, positive(top)) };
    let mut body = String::new();
    for tenth in [0.0, 2.0, 4.0, 6.0, 8.0, 10.0] {
        let value = frame.x.1 * tenth / 10.0;
        body.push_str(&frame.tick_x(value, &number(value)));
    }
    body.push_str(&frame.ticks_y());
    let finite =
        |points: &[(f64, f64)]| points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let curves: Vec<(String, Vec<(f64, f64)>)> =
        plot.lines.iter().map(|line| (line.name.clone(), finite(&line.points))).collect();
    body.push_str(&frame.curves(&curves));
    body.push_str(&text(WIDTH - 10.0, HEIGHT - 4.0, "end", "quiet", &plot.x));
    body.push_str(&text(4.0, 12.0, "start", "quiet", &plot.y));
    svg(HEIGHT, &body)
}

/// Where values lie in a picture with axes.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
}

impl Frame {
    fn at_x(&self, value: f64) -> f64 {
        MARGIN_LEFT + (value - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - MARGIN_LEFT - 20.0)
    }

    fn at_y(&self, value: f64) -> f64 {
        let room = HEIGHT - MARGIN_BOTTOM - 30.0;
        HEIGHT - MARGIN_BOTTOM - (value - self.y.0) / (self.y.1 - self.y.0) * room
    }

    fn tick_x(&self, value: f64, label: &str) -> String {
        let (x, bottom) = (self.at_x(value), HEIGHT - MARGIN_BOTTOM);
        let line = format!("<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"30\" y2=\"{bottom:.1}\" stroke=\"#e6ebf0\"/>\n");
        line + &text(x, bottom + 16.0, "middle", "quiet", label)
    }

    fn ticks_y(&self) -> String {
        let tick = |quarter: u32| {
            let value = self.y.1 * f64::from(quarter) / 4.0;
            let (y, right) = (self.at_y(value), WIDTH - 20.0);
            let line =
                format!("<line x1=\"{MARGIN_LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#e6ebf0\"/>\n");
            line + &text(MARGIN_LEFT - 8.0, y + 4.0, "end", "quiet", &number(value))
        };
        (0..=4).map(tick).collect()
    }

    fn curves(&self, curves: &[(String, Vec<(f64, f64)>)]) -> String {
        let mut drawn = String::new();
        for (index, (name, points)) in curves.iter().enumerate() {
            let color = COLORS[index % COLORS.len()];
            let points: Vec<String> =
                points.iter().map(|(x, y)| format!("{:.1},{:.1}", self.at_x(*x), self.at_y(*y))).collect();
            let points = points.join(" ");
            drawn.push_str(&format!(
                "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\"/>\n"
            ));
            let x = 220.0 + index as f64 * 190.0;
            drawn.push_str(&rect(x, 4.0, 12.0, 12.0, color));
            drawn.push_str(&text(x + 18.0, 14.0, "start", "quiet", name));
        }
        drawn
    }
}

fn finite(value: f64) -> f64 {
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

fn rect(x: f64, y: f64, width: f64, height: f64, color: &str) -> String {
    format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{color}\"/>\n")
}

fn text(x: f64, y: f64, anchor: &str, class: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>\n", escape(text))
}

fn svg(height: f64, body: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" xml:space=\"preserve\">\n{body}</svg>\n")
}

/// Text that cannot be taken for markup.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no word for them.
            c if c.is_control() && c != '\n' => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Line;

    /// Goal: what has no finite place in a picture does not spoil it.
    #[test]
    fn pictures_survive_odd_values() {
        let bar = Bar {
            name: "a".to_owned(),
            parts: vec![(f64::NAN, "red")],
            range: Some((f64::NAN, f64::INFINITY)),
            note: None,
        };
        let drawn = bars(&Bars { unit: "x".to_owned(), legend: Vec::new(), bars: vec![bar] });
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        let line = Line { name: "a".to_owned(), points: vec![(0.0, f64::NAN), (0.0, 0.0)] };
        let plot = Plot { title: String::new(), x: "s".to_owned(), y: "n".to_owned(), lines: vec![line] };
        let drawn = lines(&plot);
        assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{drawn}");
        assert_eq!(histogram("ms", &[]), "");
    }

    /// Goal: the longest bar fills the room and the others stand in proportion.
    #[test]
    fn bars_are_in_proportion() {
        let bar = |length| Bar { name: String::new(), parts: vec![(length, "red")], range: None, note: None };
        let drawn = bars(&Bars { unit: String::new(), legend: Vec::new(), bars: vec![bar(10.0), bar(5.0)] });
        assert!(drawn.contains("width=\"360.0\"") && drawn.contains("width=\"180.0\""), "{drawn}");
    }
}
