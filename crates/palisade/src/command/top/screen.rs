//! Draws a [`Model`] into the cells of a terminal.

use std::time::Duration;

use palisade_flowlog::duration;
use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
};

use super::model::{Model, Naming, Rate, Sort};

/// Keys, for the last line; the first that fit are shown.
const KEYS: [&str; 7] = [
    "q quit",
    "p pause",
    "f flows",
    "d dropped",
    "n name",
    "l labels",
    "r reset",
];
/// Width of a column of numbers.
const NUMBER_WIDTH: u16 = 9;
/// Width from which rules and drops are side by side.
const WIDE: u16 = 110;

/// Draws the model. `colour`: whether colours are used besides bold and reverse text.
pub(super) fn draw(model: &Model, area: Rect, buffer: &mut Buffer, colour: bool) {
    let mut screen = Screen {
        buffer,
        area,
        y: area.y,
        colour,
    };
    screen.head(model);
    // The last line has the keys.
    let end = area.bottom().saturating_sub(1);
    let left = end.saturating_sub(screen.y);
    let workers = if left >= 14 {
        u16::try_from(model.workers.len()).unwrap_or(u16::MAX).min(4) + 1
    } else {
        0
    };
    let below = if left >= 9 { (left - workers) / 2 } else { 0 };
    screen.talkers(model, end - below - workers);
    if below > 0 {
        screen.y = end - below - workers;
        screen.rules_and_drops(model, end - workers);
    }
    if workers > 0 {
        screen.y = end - workers;
        screen.workers(model, end);
    }
    screen.y = end;
    screen.keys();
}

/// Returns the model as lines of text.
pub(super) fn lines(model: &Model, width: u16, height: u16) -> Vec<String> {
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    draw(model, area, &mut buffer, false);
    text_of(&buffer)
}

fn text_of(buffer: &Buffer) -> Vec<String> {
    let area = buffer.area;
    (area.top()..area.bottom())
        .map(|y| {
            let row: String = (area.left()..area.right())
                .filter_map(|x| buffer.cell((x, y)))
                .map(|cell| cell.symbol())
                .collect();
            row.trim_end().to_owned()
        })
        .collect()
}

struct Screen<'a> {
    buffer: &'a mut Buffer,
    area: Rect,
    /// Next line.
    y: u16,
    colour: bool,
}

impl Screen<'_> {
    fn head(&mut self, model: &Model) {
        let uptime = duration::format(Duration::from_secs(model.uptime));
        let (state, style) = match (&model.problem, model.is_ready) {
            (Some(_), _) => ("NO ANSWER", self.bad()),
            (None, true) => ("ready", self.good()),
            (None, false) => ("NOT READY", self.bad()),
        };
        let paused = if model.is_paused { "  PAUSED" } else { "" };
        let title = format!("palisade top  {}  up {uptime}  ", model.node);
        let x = self.put(self.area.x, self.area.right(), &title, bold());
        self.put(x, self.area.right(), &format!("{state}{paused}"), style);
        self.y += 1;
        if let Some(problem) = &model.problem {
            let style = self.bad();
            self.line(problem, style);
        }
        let verdicts = &model.verdicts;
        self.line(
            &format!(
                "flows {}/s  forwarded {}  dropped {}  audit {}  lost {}",
                short(model.flows),
                verdicts.forwarded,
                verdicts.dropped,
                verdicts.audit,
                model.lost
            ),
            Style::new(),
        );
        self.line(
            &format!(
                "conntrack {} of {}  events not sent {}",
                model.conntrack.0, model.conntrack.1, model.suppressed
            ),
            Style::new(),
        );
    }

    fn talkers(&mut self, model: &Model, end: u16) {
        let by = match model.naming {
            Naming::Name => "TALKERS",
            Naming::Labels => "TALKERS (labels)",
        };
        let mark = |sort| if model.sort == sort { "*" } else { "" };
        let columns = [
            format!("FLOWS{}", mark(Sort::Flows)),
            format!("DROPPED{}", mark(Sort::Dropped)),
        ];
        let title = format!("{by}{}", mark(Sort::Name));
        self.columns(self.area, &title, &columns, bold_reversed());
        for talker in &model.talkers {
            if self.y >= end {
                return;
            }
            let style = if talker.counts.dropped > 0 {
                self.bad()
            } else {
                Style::new()
            };
            self.columns(
                self.area,
                &format!("{} -> {}", talker.source, talker.destination),
                &[talker.counts.all.to_string(), talker.counts.dropped.to_string()],
                style,
            );
        }
    }

    fn rules_and_drops(&mut self, model: &Model, end: u16) {
        let (x, y, width) = (self.area.x, self.y, self.area.width);
        if width >= WIDE {
            let left = width / 2;
            self.rates(Rect::new(x, y, left - 1, end - y), "RULES", &model.rules, end);
            self.y = y;
            let right = Rect::new(x + left, y, width - left, end - y);
            self.rates(right, "DROPS", &model.drops, end);
        } else {
            let middle = y + (end - y) / 2;
            self.rates(Rect::new(x, y, width, middle - y), "RULES", &model.rules, middle);
            self.y = middle;
            self.rates(
                Rect::new(x, middle, width, end - middle),
                "DROPS",
                &model.drops,
                end,
            );
        }
    }

    fn rates(&mut self, area: Rect, title: &str, rates: &[Rate], end: u16) {
        let columns = ["/S".to_owned(), "PACKETS".to_owned()];
        self.columns(area, title, &columns, bold_reversed());
        for rate in rates {
            if self.y >= end {
                return;
            }
            let columns = [short(rate.rate), short(rate.total as f64)];
            self.columns(area, &rate.text, &columns, Style::new());
        }
    }

    fn workers(&mut self, model: &Model, end: u16) {
        let header = ["IN/S", "OUT/S", "HELD", "FLOWS", "DROPPED"].map(str::to_owned);
        self.columns(self.area, "WORKERS", &header, bold_reversed());
        for worker in &model.workers {
            if self.y >= end {
                return;
            }
            let columns = [
                short(worker.packets_in),
                short(worker.packets_out),
                worker.held.to_string(),
                worker.flows.to_string(),
                worker.dropped.to_string(),
            ];
            let style = if worker.state == "running" {
                Style::new()
            } else {
                self.bad()
            };
            self.columns(
                self.area,
                &format!("{} {}", worker.number, worker.state),
                &columns,
                style,
            );
        }
    }

    fn keys(&mut self) {
        let mut text = String::new();
        for key in KEYS {
            let longer = text.len() + key.len() + usize::from(!text.is_empty()) * 2;
            if longer > usize::from(self.area.width) {
                break;
            }
            if !text.is_empty() {
                text.push_str("  ");
            }
            text.push_str(key);
        }
        self.line(&text, bold());
    }

    /// Draws a text at the left and numbers at the right, each in a column of [`NUMBER_WIDTH`] cells, on the next line.
    fn columns(&mut self, area: Rect, text: &str, numbers: &[String], style: Style) {
        if self.y >= self.area.bottom() {
            return;
        }
        let row = Rect::new(area.x, self.y, area.width, 1);
        self.buffer.set_style(row, style);
        let count = u16::try_from(numbers.len()).unwrap_or(0);
        let first = area.right().saturating_sub(count * NUMBER_WIDTH).max(area.x);
        self.put(area.x, first, text, style);
        for (place, number) in (0..).zip(numbers) {
            let at = first + place * NUMBER_WIDTH;
            let text = format!("{number:>width$}", width = usize::from(NUMBER_WIDTH));
            self.put(at, (at + NUMBER_WIDTH).min(area.right()), &text, style);
        }
        self.y += 1;
    }

    fn line(&mut self, text: &str, style: Style) {
        self.put(self.area.x, self.area.right(), text, style);
        self.y += 1;
    }

    /// Draws a text between two columns of the current line. Returns the column after it.
    fn put(&mut self, x: u16, end: u16, text: &str, style: Style) -> u16 {
        if self.y >= self.area.bottom() || x >= end {
            return x;
        }
        let (next, _) = self
            .buffer
            .set_stringn(x, self.y, text, usize::from(end - x), style);
        next
    }

    fn good(&self) -> Style {
        if self.colour {
            bold().fg(Color::Green)
        } else {
            bold()
        }
    }

    fn bad(&self) -> Style {
        if self.colour {
            Style::new().fg(Color::Red)
        } else {
            Style::new()
        }
    }
}

const fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

const fn bold_reversed() -> Style {
    Style::new().add_modifier(Modifier::BOLD.union(Modifier::REVERSED))
}

/// Returns a number with at most four digits and a unit.
fn short(number: f64) -> String {
    match number {
        n if n < 10.0 && n.fract() > 0.0 => format!("{n:.1}"),
        n if n < 10_000.0 => format!("{n:.0}"),
        n if n < 10_000_000.0 => format!("{:.0}k", n / 1e3),
        n if n < 10_000_000_000.0 => format!("{:.0}M", n / 1e6),
        n => format!("{:.0}G", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::model::tests::busy, *};

    fn drawn(model: &Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal
            .draw(|frame| {
                let area = frame.area();
                draw(model, area, frame.buffer_mut(), true);
            })
            .unwrap();
        text_of(terminal.backend().buffer())
    }

    #[test]
    fn a_screen_of_80_by_24_shows_everything() {
        let text = drawn(&busy(), 80, 24);
        assert_eq!(
            text,
            [
                "palisade top  node1  up 1h2m  ready",
                "flows 210/s  forwarded 400  dropped 20  audit 1  lost 5",
                "conntrack 1234 of 262144  events not sent 0",
                "TALKERS                                                          FLOWS*  DROPPED",
                "default/front -> default/web                                        400        0",
                "default/db -> default/web                                            20       20",
                "default/x\\u{1b}[2Jy -> default/web                                    1        0",
                "",
                "",
                "",
                "",
                "",
                "RULES                                                                /S  PACKETS",
                "default/web ingress rule 1                                          400      900",
                "",
                "",
                "DROPS                                                                /S  PACKETS",
                "ingress Policy denied (133)                                          10       30",
                "",
                "",
                "",
                "WORKERS                                 IN/S    OUT/S     HELD    FLOWS  DROPPED",
                "0 running                               2000     2000        3       12        0",
                "q quit  p pause  f flows  d dropped  n name  l labels  r reset",
            ]
        );
        assert_eq!(text, lines(&busy(), 80, 24));
    }

    #[test]
    fn a_screen_of_40_by_10_shows_talkers_and_keys() {
        assert_eq!(
            drawn(&busy(), 40, 10),
            [
                "palisade top  node1  up 1h2m  ready",
                "flows 210/s  forwarded 400  dropped 20",
                "conntrack 1234 of 262144  events not sen",
                "TALKERS                  FLOWS*  DROPPED",
                "default/front -> defau      400        0",
                "default/db -> default/       20       20",
                "default/x\\u{1b}[2Jy ->        1        0",
                "",
                "",
                "q quit  p pause  f flows  d dropped",
            ]
        );
    }

    #[test]
    fn any_size_can_be_drawn() {
        let mut model = busy();
        model.problem = Some("the daemon is not running".into());
        model.workers = vec![model.workers[0].clone(); 300];
        for (width, height) in [(1, 1), (0, 0), (5, 3), (200, 2), (3, 60), (300, 100)] {
            drawn(&model, width, height);
        }
    }

    #[test]
    fn a_pause_and_a_daemon_that_has_gone_are_shown() {
        let mut model = busy();
        model.is_paused = true;
        assert!(drawn(&model, 80, 24)[0].ends_with("ready  PAUSED"));
        model.problem = Some("the daemon is not running".into());
        let text = drawn(&model, 80, 24);
        assert!(
            text[0].contains("NO ANSWER") && text[1] == "the daemon is not running",
            "{text:?}"
        );
    }

    #[test]
    fn numbers_have_at_most_five_characters() {
        let texts = [0.0, 0.25, 9.99, 42.0, 9_999.0, 12_345.0, 98_765_432.0, 5e10].map(short);
        assert_eq!(texts, ["0", "0.2", "10.0", "42", "9999", "12k", "99M", "50G"]);
    }
}
