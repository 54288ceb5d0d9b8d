//! The daemon's log: one line for each event, with its fields, on the standard error output. Every line names its
//! component, and the level of each component can change while the daemon runs.
//!
//! If systemd has connected the output to the journal (`$JOURNAL_STREAM`, systemd.exec(5)), each line begins with its
//! priority (`<3>`, sd-daemon(3)) instead of the time, which the journal has itself. Control characters in messages and
//! fields are escaped, because some texts come from peers: a line break could forge a line, and an escape sequence could
//! control the operator's terminal.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::{self, IsTerminal as _},
    sync::OnceLock,
};

use nix::sys::stat::fstat;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{
    Layer as _, Registry,
    filter::Targets,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt as _,
};

/// Target of the lines about single inspected connections.
pub(crate) const INSPECT_TARGET: &str = "palisade::inspect";

/// Components, and the targets (module paths) of their lines. The longest target that is a prefix of a line's target
/// decides.
pub(crate) const COMPONENTS: &[(&str, &[&str])] = &[
    // The rest.
    ("daemon", &["palisade"]),
    (
        "control",
        &[
            "palisade::control",
            "palisade::daemon::control",
            "palisade::daemon::handlers",
            "palisade::daemon::watchdog",
        ],
    ),
    (
        "datapath",
        &[
            "palisade_datapath",
            "palisade::daemon::events",
            "palisade::daemon::sweeper",
        ],
    ),
    ("export", &["palisade::daemon::export"]),
    (
        "flows",
        &["palisade_flowlog", "palisade_hubble", "palisade::daemon::hubble"],
    ),
    ("fqdn", &["palisade::daemon::fqdn", "palisade_fqdn"]),
    ("inspect", &[INSPECT_TARGET, "palisade_inspect"]),
    (
        "intercept",
        &[
            "palisade_intercept",
            "palisade_secrets",
            "palisade::daemon::interception",
            "palisade::daemon::proxy_link",
        ],
    ),
    (
        "metrics",
        &[
            "palisade_metrics",
            "palisade::daemon::metrics",
            "palisade::daemon::measured",
        ],
    ),
    (
        "netfilter",
        &["palisade::daemon::netfilter", "palisade::daemon::nat"],
    ),
    (
        "network",
        &["palisade::daemon::network", "palisade::daemon::interfaces"],
    ),
    (
        "policy",
        &[
            "palisade_policy",
            "palisade::daemon::policies",
            "palisade::daemon::watcher",
            "palisade::daemon::enforcer",
            "palisade::daemon::reload",
        ],
    ),
    (
        "state",
        &[
            "palisade::daemon::state",
            "palisade::daemon::keeper",
            "palisade::daemon::last_good",
            "palisade::daemon::private_dirs",
        ],
    ),
    (
        "worker",
        &["palisade_worker", "palisade_xsk", "palisade::daemon::workers"],
    ),
];

/// The filter of the running log, and the level at its start.
struct Log {
    filter: reload::Handle<Targets, Registry>,
    level: Level,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Starts the log. `level`: level of Palisade's own lines; libraries have at most INFO.
pub(crate) fn start(level: Level) {
    let (filter, handle) = reload::Layer::new(targets(level, &BTreeMap::new()));
    let format = Lines {
        is_journal: is_journal(std::env::var("JOURNAL_STREAM").ok().as_deref()),
        ansi: io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let lines = tracing_subscriber::fmt::layer()
        .event_format(format)
        .with_writer(io::stderr);
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .init();
    // Set once per process.
    let _ = LOG.set(Log {
        filter: handle,
        level,
    });
}

/// Returns the level of components without a level of their own.
pub(crate) fn default_level() -> Level {
    LOG.get().map_or(Level::INFO, |log| log.level)
}

/// Gives components levels of their own, and all others the level of the start.
///
/// # Errors
/// A text if the log has not been started.
pub(crate) fn set_levels(levels: &BTreeMap<&'static str, LevelFilter>) -> Result<(), String> {
    let log = LOG.get().ok_or("the log does not run")?;
    log.filter
        .reload(targets(log.level, levels))
        .map_err(|error| error.to_string())
}

/// Returns the component of this name.
///
/// # Errors
/// A text with the known names.
pub(crate) fn component(name: &str) -> Result<&'static str, String> {
    let found = COMPONENTS.iter().find(|(known, _)| *known == name);
    found.map(|(known, _)| *known).ok_or_else(|| {
        let names: Vec<&str> = COMPONENTS.iter().map(|(name, _)| *name).collect();
        format!(
            "the log has no component '{name}': it is one of {}",
            names.join(", ")
        )
    })
}

fn targets(level: Level, levels: &BTreeMap<&'static str, LevelFilter>) -> Targets {
    // No debug messages of libraries.
    let base = Targets::new()
        .with_default(level.min(Level::INFO))
        .with_target("palisade", level);
    let own = COMPONENTS.iter().flat_map(|(name, targets)| {
        let level = levels.get(name).copied().unwrap_or_else(|| level.into());
        targets.iter().map(move |target| (*target, level))
    });
    base.with_targets(own)
}

/// Returns the component of a line by its target: that with the longest prefix.
fn component_of(target: &str) -> &'static str {
    COMPONENTS
        .iter()
        .flat_map(|(name, prefixes)| prefixes.iter().map(move |prefix| (*name, *prefix)))
        .filter(|(_, prefix)| target.starts_with(prefix))
        .max_by_key(|(_, prefix)| prefix.len())
        .map_or("library", |(name, _)| name)
}

/// Returns whether the standard error output is the stream that systemd has connected to the journal. `named`: value of
/// `$JOURNAL_STREAM`, device and inode of the stream. A process that inherits the variable can have another output.
fn is_journal(named: Option<&str>) -> bool {
    let Ok(stat) = fstat(io::stderr()) else {
        return false;
    };
    named.is_some_and(|named| named == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Format of the lines.
#[derive(Clone, Copy)]
struct Lines {
    is_journal: bool,
    ansi: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let head = self.head(*metadata.level());
        let component = fields
            .component
            .unwrap_or_else(|| component_of(metadata.target()).to_owned());
        writeln!(
            writer,
            "{head}{} component={component}{}",
            fields.message, fields.others
        )
    }
}

impl Lines {
    /// Returns the beginning of a line: time and level, or the priority of the journal.
    fn head(self, level: Level) -> String {
        if self.is_journal {
            // sd-daemon(3): SD_ERR, SD_WARNING, SD_INFO and SD_DEBUG.
            let priority = match level {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                Level::DEBUG | Level::TRACE => 7,
            };
            return format!("<{priority}>");
        }
        let time = jiff::Timestamp::now();
        if !self.ansi {
            return format!("{time:.6} {level:>5} ");
        }
        let colour = match level {
            Level::ERROR => 31,
            Level::WARN => 33,
            Level::INFO => 32,
            Level::DEBUG => 34,
            Level::TRACE => 35,
        };
        format!("\x1b[2m{time:.6}\x1b[0m \x1b[{colour}m{level:>5}\x1b[0m ")
    }
}

/// The fields of an event as text.
#[derive(Default)]
struct Fields {
    message: String,
    component: Option<String>,
    /// ` NAME=VALUE` for each other field.
    others: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "component" => self.component = Some(printable(value)),
            "message" => self.message = printable(value),
            name => {
                let _ = write!(self.others, " {name}={}", printable(&format!("{value:?}")));
            }
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = printable(&format!("{value:?}"));
        match field.name() {
            "component" => self.component = Some(text),
            "message" => self.message = text,
            name => {
                let _ = write!(self.others, " {name}={text}");
            }
        }
    }
}

/// Returns a text with its control characters escaped, those that reverse the direction of text too.
pub(crate) fn printable(text: &str) -> String {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use tracing::{debug, error, info, warn};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: Lines, levels: &BTreeMap<&'static str, LevelFilter>, log: impl FnOnce()) -> String {
        let written = Written::default();
        let writer = written.clone();
        let lines = tracing_subscriber::fmt::layer()
            .event_format(format)
            .with_writer(move || writer.clone());
        let filter = targets(Level::INFO, levels);
        let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter));
        tracing::subscriber::with_default(subscriber, log);
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    const PLAIN: Lines = Lines {
        is_journal: false,
        ansi: false,
    };

    #[test]
    fn each_line_names_its_component_and_fields() {
        let text = logged(PLAIN, &BTreeMap::new(), || {
            info!(target: "palisade::daemon::policies", file = "a.yaml", rules = 3, "a file is read");
            warn!(target: "palisade_intercept::thread", error = %"refused", "a connection failed");
            info!(target: "palisade::daemon::startup", component = "export", "an export has begun");
            info!(target: "hickory_proto", "a library");
        });
        let lines: Vec<&str> = text
            .lines()
            .map(|line| &line[line.find('Z').unwrap() + 1..])
            .collect();
        assert_eq!(
            lines,
            [
                "  INFO a file is read component=policy file=\"a.yaml\" rules=3",
                "  WARN a connection failed component=intercept error=refused",
                "  INFO an export has begun component=export",
                "  INFO a library component=library",
            ]
        );
    }

    #[test]
    fn the_journal_gets_priorities() {
        let format = Lines {
            is_journal: true,
            ansi: false,
        };
        let text = logged(format, &BTreeMap::new(), || {
            error!(target: "palisade::x", "a");
            warn!(target: "palisade::x", "b");
            info!(target: "palisade::x", "c");
        });
        assert_eq!(
            text,
            "<3>a component=daemon\n<4>b component=daemon\n<6>c component=daemon\n"
        );
        assert!(!is_journal(None) && !is_journal(Some("1:1")) && !is_journal(Some("")));
        let stat = fstat(io::stderr()).unwrap();
        assert!(is_journal(Some(&format!("{}:{}", stat.st_dev, stat.st_ino))));
    }

    #[test]
    fn texts_of_peers_forge_no_lines_and_send_no_escape_sequences() {
        let text = logged(PLAIN, &BTreeMap::new(), || {
            info!(target: "palisade::x", error = %"a\nERROR b\x1b[2J", name = "\u{202e}c\r", "d\te");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("d\\te component=daemon error=a\\nERROR b\\u{1b}[2J"),
            "{text}"
        );
        assert!(!text.contains('\u{202e}') && !text.contains('\r'), "{text}");
    }

    #[test]
    fn a_level_applies_to_its_component_only() {
        let levels = BTreeMap::from([("policy", LevelFilter::DEBUG), ("fqdn", LevelFilter::OFF)]);
        let text = logged(PLAIN, &levels, || {
            debug!(target: "palisade::daemon::policies", "1");
            debug!(target: "palisade::daemon::export", "2");
            error!(target: "palisade::daemon::fqdn::manager", "3");
            info!(target: "palisade::daemon::export", "4");
            debug!(target: "hickory_proto", "5");
        });
        let said: Vec<&str> = text
            .split(" component=")
            .flat_map(|part| part.rsplit(' ').next())
            .collect();
        assert_eq!(said, ["1", "4", "export\n"], "{text}");
    }

    #[test]
    fn every_component_has_targets_of_its_own() {
        for (name, targets) in COMPONENTS {
            for target in *targets {
                assert_eq!(component_of(target), *name, "{target}");
            }
        }
        assert_eq!(component("fqdn"), Ok("fqdn"));
        assert!(
            component("dns")
                .unwrap_err()
                .contains("it is one of daemon, control")
        );
    }
}
