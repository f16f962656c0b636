//! What the demo says while it runs: bars at a terminal, a line every two seconds elsewhere. All on stderr.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// How far orders, messages and invoices are.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Orders that were committed, as their clients know.
    pub ordered: u64,
    /// Messages of the outbox that the relay has settled.
    pub published: u64,
    /// Invoices.
    pub invoiced: u64,
}

/// The display.
pub struct Progress {
    began: Instant,
    bars: Option<Bars>,
    /// The counts shown, and when the last line of them was: shared by all that look.
    shown: Mutex<(Counts, Instant)>,
}

struct Bars {
    all: MultiProgress,
    ordered: ProgressBar,
    published: ProgressBar,
    invoiced: ProgressBar,
}

impl Progress {
    /// A display that expects `orders` orders to be committed; nothing is drawn yet.
    pub fn new(orders: u64) -> Self {
        let all = MultiProgress::new();
        let terminal = !all.is_hidden();
        let style = ProgressStyle::with_template("  {prefix:10} {bar:40} {pos:>8}")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("█▓░");
        let bar = |name: &'static str| all.add(ProgressBar::new(orders).with_style(style.clone()).with_prefix(name));
        let bars = terminal.then(|| {
            let (ordered, published, invoiced) = (bar("ordered"), bar("published"), bar("invoiced"));
            Bars { ordered, published, invoiced, all: all.clone() }
        });
        let now = Instant::now();
        Self { began: now, bars, shown: Mutex::new((Counts::default(), now)) }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Says that something happened, with the time.
    pub fn note(&self, text: &str) {
        self.line(&format!("{:5.1} s  {text}", self.began.elapsed().as_secs_f64()));
    }

    fn line(&self, text: &str) {
        match &self.bars {
            // A terminal that is gone is no reason to end.
            Some(bars) => drop(bars.all.println(text)),
            None => eprintln!("{text}"),
        }
    }

    /// Shows the counts. None of them ever falls: what is not known at the moment may be 0.
    pub fn show(&self, counts: Counts) {
        let mut shown = self.shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let ordered = counts.ordered.max(shown.0.ordered);
        let published = counts.published.max(shown.0.published);
        let invoiced = counts.invoiced.max(shown.0.invoiced);
        shown.0 = Counts { ordered, published, invoiced };
        if let Some(bars) = &self.bars {
            for (bar, count) in [(&bars.ordered, ordered), (&bars.published, published), (&bars.invoiced, invoiced)] {
                bar.set_position(count);
            }
        } else if shown.1.elapsed() >= LINE_EVERY {
            shown.1 = Instant::now();
            self.note(&format!("ordered {ordered}, published {published}, invoiced {invoiced}"));
        }
    }

    /// Takes the bars away.
    pub fn clear(&self) {
        if let Some(bars) = &self.bars {
            for bar in [&bars.ordered, &bars.published, &bars.invoiced] {
                bar.finish_and_clear();
            }
        }
    }
}
