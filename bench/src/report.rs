//! The report: samples, medians, tables, a plot; as Markdown and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::machine::Machine;

/// All results of one run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// When it ended, RFC 3339.
    pub date: String,
    /// Whether it was a quick run: fewer and shorter samples.
    pub quick: bool,
    /// The machine.
    pub machine: Machine,
    /// Results of the measures.
    pub measures: Vec<Measure>,
}

/// Results of one measure.
#[derive(Debug, Serialize)]
pub struct Measure {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its title.
    pub title: &'static str,
    /// How it measures.
    pub method: String,
    /// Its goals, one line for each.
    pub goals: Vec<Goal>,
    /// The figures.
    pub tables: Vec<Table>,
    /// A plot of the figures, if there is one.
    #[serde(skip)]
    pub plot: Option<Plot>,
    /// Remarks.
    pub notes: Vec<String>,
}

/// A goal.
#[derive(Debug, Serialize)]
pub struct Goal {
    /// What is compared, in words.
    pub what: String,
    /// The bound, in words.
    pub reach: String,
    /// What was measured, in words.
    pub measured: String,
    /// Whether the goal was reached; none if the figure is only reported.
    pub reached: Option<bool>,
}

impl Goal {
    /// Returns the goal that `value` is at most `bound`.
    #[must_use]
    pub fn at_most(what: impl Into<String>, bound: f64, value: f64, unit: &str) -> Self {
        Self {
            what: what.into(),
            reach: format!("at most {}{unit}", number(bound)),
            measured: format!("{}{unit}", number(value)),
            reached: Some(value <= bound),
        }
    }

    /// Returns a figure that is only reported.
    #[must_use]
    pub fn reported(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            reach: "reported".into(),
            measured: measured.into(),
            reached: None,
        }
    }

    /// Returns the goal that `value` is below `bound`.
    #[must_use]
    pub fn below(what: impl Into<String>, bound: f64, value: f64, unit: &str) -> Self {
        Self {
            what: what.into(),
            reach: format!("below {}{unit}", number(bound)),
            measured: format!("{}{unit}", number(value)),
            reached: Some(value < bound),
        }
    }

    /// Returns the goal that `value` is at least `bound`.
    #[must_use]
    pub fn at_least(what: impl Into<String>, bound: f64, value: f64, unit: &str) -> Self {
        Self {
            what: what.into(),
            reach: format!("at least {}{unit}", number(bound)),
            measured: format!("{}{unit}", number(value)),
            reached: Some(value >= bound),
        }
    }
}

/// Figures in rows. The first column names the row.
#[derive(Debug, Serialize)]
pub struct Table {
    /// Title of the table.
    pub caption: String,
    /// Headings of the columns, with units.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
}

/// A row of a table.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Name of the row.
    pub name: String,
    /// A figure for each further column; none if there is nothing to measure.
    pub values: Vec<Option<f64>>,
}

impl Table {
    /// Returns a table without rows.
    #[must_use]
    pub fn new(caption: impl Into<String>, columns: &[&str]) -> Self {
        Self {
            caption: caption.into(),
            columns: columns.iter().map(|c| (*c).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, name: impl Into<String>, values: &[f64]) {
        self.rows.push(Row {
            name: name.into(),
            values: values.iter().map(|v| v.is_finite().then_some(*v)).collect(),
        });
    }
}

/// Samples of one figure.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Returns an empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a sample.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Returns the median; NaN if there are no samples.
    #[must_use]
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Returns a quantile; NaN if there are no samples.
    #[must_use]
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1) as f64;
        sorted
            .get((last * part).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// Returns half the interquartile range relative to the median: the spread of the samples.
    #[must_use]
    pub fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / 2.0 / self.median()
    }

    /// Returns the ratios of these samples to another set's of the same rounds.
    #[must_use]
    pub fn against(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// Returns the number of samples.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no samples.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Formats a figure with a readable number of digits.
#[must_use]
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 1_000.0 {
        let whole = format!("{magnitude:.0}");
        let mut out = String::from(if value < 0.0 { "-" } else { "" });
        for (at, digit) in whole.chars().enumerate() {
            if at > 0 && (whole.len() - at).is_multiple_of(3) {
                out.push(',');
            }
            out.push(digit);
        }
        out
    } else if magnitude >= 100.0 || magnitude == magnitude.round() {
        format!("{value:.0}")
    } else if magnitude >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

impl Report {
    /// Returns the report as Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::from("# Benchmarks\n\n");
        let kind = if self.quick { ", a quick run" } else { "" };
        let _ = writeln!(
            out,
            "Made by `scripts/bench`, {}{kind}. Medians.\n\n{}\n",
            self.date, self.machine
        );
        out.push_str("| measure | reach | measured | reached |\n|---|---|---|---|\n");
        for goal in self.measures.iter().flat_map(|m| &m.goals) {
            let reached = match goal.reached {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "",
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {reached} |",
                goal.what, goal.reach, goal.measured
            );
        }
        for measure in &self.measures {
            let _ = write!(out, "\n## {}\n\n{}\n", measure.title, measure.method);
            for table in &measure.tables {
                let _ = write!(out, "\n{}\n\n", table.caption);
                let _ = writeln!(out, "| {} |", table.columns.join(" | "));
                let _ = writeln!(out, "|---{}|", "|---:".repeat(table.columns.len() - 1));
                for row in &table.rows {
                    let values: Vec<_> = row
                        .values
                        .iter()
                        .map(|v| v.map_or_else(|| "-".into(), number))
                        .collect();
                    let _ = writeln!(out, "| {} | {} |", row.name, values.join(" | "));
                }
            }
            if measure.plot.is_some() {
                let _ = write!(out, "\n![{}]({}.svg)\n", measure.title, measure.name);
            }
            for note in &measure.notes {
                let _ = write!(out, "\n{note}\n");
            }
        }
        out
    }
}

/// Curves over a size, with two logarithmic axes.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Label of the horizontal axis.
    pub x: &'static str,
    /// Label of the vertical axis.
    pub y: &'static str,
    /// Curves: name and points.
    pub curves: Vec<(String, Vec<(f64, f64)>)>,
}

impl Plot {
    /// Draws the plot as SVG. Each axis covers whole powers of ten.
    #[must_use]
    pub fn svg(&self) -> String {
        const COLOURS: [&str; 6] = ["#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#787774"];
        const LEFT: f64 = 80.0;
        const RIGHT: f64 = 440.0;
        const TOP: f64 = 20.0;
        const BOTTOM: f64 = 300.0;
        let points = || self.curves.iter().flat_map(|(_, points)| points);
        let (x, y) = (
            Axis::over(points().map(|p| p.0)),
            Axis::over(points().map(|p| p.1)),
        );
        let at_x = |value: f64| LEFT + x.part(value) * (RIGHT - LEFT);
        let at_y = |value: f64| BOTTOM - y.part(value) * (BOTTOM - TOP);
        let mut svg = String::from(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 620 350\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"620\" height=\"350\" fill=\"white\"/>\n",
        );
        for power in x.first..=x.last {
            let (at, value) = (at_x(10_f64.powi(power)), number(10_f64.powi(power)));
            let _ = writeln!(svg, "<path d=\"M{at:.1} {TOP}V{BOTTOM}\" stroke=\"#ddd\"/>");
            let _ = writeln!(
                svg,
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>",
                BOTTOM + 18.0
            );
        }
        for power in y.first..=y.last {
            let (at, value) = (at_y(10_f64.powi(power)), number(10_f64.powi(power)));
            let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1}H{RIGHT}\" stroke=\"#ddd\"/>");
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
                LEFT - 6.0,
                at + 4.0
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"340\" text-anchor=\"middle\">{}</text>",
            (LEFT + RIGHT) / 2.0,
            self.x
        );
        let _ = writeln!(svg, "<text x=\"{}\" y=\"12\">{}</text>", LEFT, self.y);
        for (n, (name, points)) in self.curves.iter().enumerate() {
            let points: Vec<_> = points.iter().filter(|p| p.0 > 0.0 && p.1 > 0.0).collect();
            let colour = COLOURS[n % COLOURS.len()];
            let path: Vec<_> = points
                .iter()
                .map(|p| format!("{:.1} {:.1}", at_x(p.0), at_y(p.1)))
                .collect();
            let _ = writeln!(
                svg,
                "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                path.join("L")
            );
            for p in &points {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    at_x(p.0),
                    at_y(p.1)
                );
            }
            let line = TOP + 14.0 + 20.0 * n as f64;
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{line}\" fill=\"{colour}\">{name}</text>",
                RIGHT + 14.0
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// A logarithmic axis.
struct Axis {
    first: i32,
    last: i32,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone) -> Self {
        let positive = values.filter(|v| v.is_finite() && *v > 0.0);
        let low = positive.clone().fold(f64::INFINITY, f64::min);
        let high = positive.fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            return Self { first: 0, last: 1 };
        }
        let first = low.log10().floor() as i32;
        Self {
            first,
            last: (high.log10().ceil() as i32).max(first + 1),
        }
    }

    fn part(&self, value: f64) -> f64 {
        (value.log10() - f64::from(self.first)) / f64::from(self.last - self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_are_read() {
        for (value, text) in [
            (0.0, "0"),
            (0.123, "0.12"),
            (1.3, "1.30"),
            (20.0, "20"),
            (12.34, "12.3"),
            (123.4, "123"),
            (1_234.0, "1,234"),
            (1_234_567.0, "1,234,567"),
            (-12_345.0, "-12,345"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn medians_and_quantiles() {
        let mut samples = Samples::new();
        assert!(samples.median().is_nan());
        for value in [5.0, 1.0, 3.0, 2.0, 4.0] {
            samples.push(value);
        }
        assert_eq!(
            (samples.median(), samples.quantile(0.99), samples.quantile(0.0)),
            (3.0, 5.0, 1.0)
        );
        assert!((samples.spread() - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn a_goal_that_is_missed_is_seen() {
        assert_eq!(Goal::at_most("", 1.3, 1.31, "").reached, Some(false));
        assert_eq!(Goal::at_least("", 0.9, 0.9, "").reached, Some(true));
        assert_eq!(Goal::below("", 20.0, 20.0, "").reached, Some(false));
        // Without a sample the goal is not reached.
        assert_eq!(Goal::at_most("", 1.3, f64::NAN, "").reached, Some(false));
    }

    #[test]
    fn a_plot_has_every_curve() {
        let curves = vec![
            ("a".to_owned(), vec![(10.0, 1.0), (10_000.0, 900.0)]),
            ("b".to_owned(), vec![(10.0, f64::NAN)]),
        ];
        let svg = Plot {
            x: "x",
            y: "y",
            curves,
        }
        .svg();
        assert!(svg.contains(">a</text>") && svg.contains(">b</text>") && svg.ends_with("</svg>\n"));
        assert!(
            svg.contains("M80.0 300.0L440.0"),
            "from the lower left corner to the right edge: {svg}"
        );
    }
}
