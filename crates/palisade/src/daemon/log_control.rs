//! `palisade log`: levels of the log's components that a client sets for a limited time, and the thread that writes the
//! steps of inspected connections.
//!
//! A setting is not saved, so a restart of the daemon ends it. Start at [`LogControl::set`]; the steps come from
//! [`palisade_inspect::steps`].

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_flowlog::{FlowResolver as _, duration};
use palisade_inspect::steps::{self, Detail, Step, Watch};
use tracing::{debug, info, level_filters::LevelFilter, warn};

use super::view::{EventNames, Shared};
use crate::{
    control::api::{LogComponent, LogSetRequest, LogStatus},
    log,
};

/// The component whose lines are steps of single connections.
const INSPECT: &str = "inspect";
/// Maximum number of steps per second that are written.
const MAX_STEPS_PER_SECOND: u32 = 500;
/// Capacity of the queue of steps.
const MAX_QUEUED_STEPS: usize = 2_048;
/// Interval at which the budget of steps is renewed and the end of the setting is checked.
const TURN: Duration = Duration::from_secs(1);
/// Shortest and longest time of a setting.
const TIMES: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);

/// Handles the requests of clients.
pub(super) struct LogControl {
    shared: Arc<Shared>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Number of the last setting; a thread of an older one ends.
    generation: u64,
    setting: Option<Setting>,
}

/// A setting in force.
struct Setting {
    levels: BTreeMap<&'static str, LevelFilter>,
    /// Name of the only endpoint whose connections are logged.
    endpoint: Option<String>,
    address: Option<IpAddr>,
    until: Instant,
    watch: Option<Arc<Watch>>,
    written: Arc<AtomicU64>,
}

impl LogControl {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            state: Arc::default(),
        }
    }

    /// Puts levels in force, instead of those of an earlier request. `endpoint`: number and name of the endpoint of the
    /// request.
    ///
    /// # Errors
    /// A text: an unknown component or level, or a time out of bounds. Nothing has changed then.
    pub(super) fn set(
        &self,
        request: &LogSetRequest,
        endpoint: Option<(u16, String)>,
    ) -> Result<LogStatus, String> {
        let levels = levels(&request.levels)?;
        let time = Duration::from_secs(request.seconds);
        if !TIMES.contains(&time) {
            return Err(format!(
                "--for must be between {} and {}",
                duration::format(*TIMES.start()),
                duration::format(*TIMES.end())
            ));
        }
        let is_limited = endpoint.is_some() || request.address.is_some();
        if let Some(other) = levels.keys().find(|name| is_limited && **name != INSPECT) {
            return Err(format!(
                "--endpoint and --address choose connections, and only {INSPECT} logs single connections: leave out {other}"
            ));
        }
        let detail = match levels.get(INSPECT) {
            Some(&LevelFilter::DEBUG) => Some(Detail::Debug),
            Some(&LevelFilter::TRACE) => Some(Detail::Trace),
            _ => None,
        };
        if is_limited && detail.is_none() {
            return Err(format!(
                "--endpoint and --address need {INSPECT}=debug or {INSPECT}=trace"
            ));
        }
        let number = endpoint.as_ref().map(|(number, _)| *number);
        let (watch, queue) = detail
            .map(|detail| Watch::new(detail, number, request.address, MAX_QUEUED_STEPS))
            .unzip();
        let setting = Setting {
            levels,
            endpoint: endpoint.map(|(_, name)| name),
            address: request.address,
            until: Instant::now() + time,
            watch: watch.clone(),
            written: Arc::default(),
        };
        let mut state = lock(&self.state);
        let generation = state.generation + 1;
        let writer = Writer {
            state: Arc::clone(&self.state),
            shared: Arc::clone(&self.shared),
            generation,
            until: setting.until,
            watch,
            written: Arc::clone(&setting.written),
        };
        thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(queue))
            .map_err(|error| format!("the thread of the log cannot be started: {error}"))?;
        state.generation = generation;
        log::set_levels(&setting.levels)?;
        steps::set(setting.watch.clone());
        info!(
            event = "log",
            levels = text_of(&setting.levels),
            endpoint = setting.endpoint.as_deref().unwrap_or("all"),
            address = setting
                .address
                .map_or_else(|| "all".to_owned(), |address| address.to_string()),
            time = duration::format(time),
            "the levels of the log are changed"
        );
        state.setting = Some(setting);
        Ok(status(&state))
    }

    /// Ends the setting in force.
    pub(super) fn reset(&self) -> Result<LogStatus, String> {
        let mut state = lock(&self.state);
        end(&mut state)?;
        Ok(status(&state))
    }

    /// Returns the levels in force.
    pub(super) fn get(&self) -> LogStatus {
        status(&lock(&self.state))
    }
}

/// Ends the setting of a state.
fn end(state: &mut State) -> Result<(), String> {
    state.generation += 1;
    steps::set(None);
    if let Some(ended) = state.setting.take() {
        let suppressed = ended.watch.map_or(0, |watch| watch.suppressed());
        info!(event = "log", suppressed, "the log has its usual levels again");
    }
    log::set_levels(&BTreeMap::new())
}

fn status(state: &State) -> LogStatus {
    let setting = state.setting.as_ref();
    let usual = log::default_level().to_string().to_lowercase();
    let components = log::COMPONENTS.iter().map(|(name, _)| {
        let own = setting.and_then(|setting| setting.levels.get(name));
        LogComponent {
            component: (*name).to_owned(),
            level: own.map_or_else(|| usual.clone(), ToString::to_string),
            is_set: own.is_some(),
        }
    });
    LogStatus {
        components: components.collect(),
        endpoint: setting.and_then(|setting| setting.endpoint.clone()),
        address: setting.and_then(|setting| setting.address),
        remaining_seconds: setting.map(|setting| {
            let left = setting.until.saturating_duration_since(Instant::now());
            left.as_secs_f64().ceil() as u64
        }),
        written: setting.map_or(0, |setting| setting.written.load(Ordering::Relaxed)),
        suppressed: setting
            .and_then(|setting| setting.watch.as_ref())
            .map_or(0, |watch| watch.suppressed()),
    }
}

/// Returns the levels of a request.
fn levels(asked: &BTreeMap<String, String>) -> Result<BTreeMap<&'static str, LevelFilter>, String> {
    if asked.is_empty() {
        return Err("no level is given: write for example inspect=debug".to_owned());
    }
    let mut levels = BTreeMap::new();
    for (name, level) in asked {
        let parsed = match level.as_str() {
            "off" => LevelFilter::OFF,
            "error" => LevelFilter::ERROR,
            "warn" => LevelFilter::WARN,
            "info" => LevelFilter::INFO,
            "debug" => LevelFilter::DEBUG,
            "trace" => LevelFilter::TRACE,
            _ => {
                return Err(format!(
                    "'{level}' is no level: it is one of off, error, warn, info, debug, trace"
                ));
            }
        };
        levels.insert(log::component(name)?, parsed);
    }
    Ok(levels)
}

fn text_of(levels: &BTreeMap<&'static str, LevelFilter>) -> String {
    let texts: Vec<String> = levels
        .iter()
        .map(|(name, level)| format!("{name}={level}"))
        .collect();
    texts.join(",")
}

/// The thread of a setting: writes steps, and ends the setting in time.
struct Writer {
    state: Arc<Mutex<State>>,
    shared: Arc<Shared>,
    generation: u64,
    until: Instant,
    watch: Option<Arc<Watch>>,
    written: Arc<AtomicU64>,
}

impl Writer {
    fn run(self, queue: Option<Receiver<Step>>) {
        let mut names = EventNames::new(self.shared.get());
        let mut suppressed = 0;
        loop {
            if let Some(watch) = &self.watch {
                watch.refill(MAX_STEPS_PER_SECOND);
            }
            let turn_end = self.until.min(Instant::now() + TURN);
            while let Some(left) = turn_end
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            {
                let Some(queue) = &queue else {
                    thread::sleep(left);
                    break;
                };
                match queue.recv_timeout(left) {
                    Ok(step) => {
                        let view = self.shared.get();
                        if !names.is_of(&view) {
                            names = EventNames::new(view);
                        }
                        write(&step, &names);
                        self.written.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            let now_suppressed = self.watch.as_ref().map_or(0, |watch| watch.suppressed());
            if now_suppressed > suppressed {
                warn!(
                    component = INSPECT,
                    suppressed = now_suppressed - suppressed,
                    "steps of inspected connections are not logged, because there are too many: choose one endpoint or \
                     address"
                );
                suppressed = now_suppressed;
            }
            let mut state = lock(&self.state);
            if state.generation != self.generation {
                return;
            }
            if Instant::now() >= self.until {
                if let Err(error) = end(&mut state) {
                    warn!(error, "the levels of the log cannot be changed");
                }
                return;
            }
        }
    }
}

fn write(step: &Step, names: &EventNames) {
    let owner = names.endpoint(step.endpoint);
    let endpoint = owner.map_or_else(
        || step.endpoint.to_string(),
        |owner| match (&*owner.namespace, &*owner.name) {
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        },
    );
    let direction = match step.direction {
        palisade_abi::Direction::Ingress => "ingress",
        palisade_abi::Direction::Egress => "egress",
    };
    let (client, server, text) = (step.client, step.server, &step.text);
    match step.rule.and_then(|rule| names.rule(rule)) {
        Some(rule) => debug!(
            target: "palisade::inspect",
            endpoint,
            direction,
            %client,
            %server,
            policy = &*rule.text,
            file = &*rule.location,
            "{text}"
        ),
        None => debug!(target: "palisade::inspect", endpoint, direction, %client, %server, "{text}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(levels: &[(&str, &str)], seconds: u64) -> LogSetRequest {
        LogSetRequest {
            levels: levels
                .iter()
                .map(|(name, level)| ((*name).to_owned(), (*level).to_owned()))
                .collect(),
            endpoint: None,
            address: None,
            seconds,
        }
    }

    #[test]
    fn wrong_requests_change_nothing_and_name_the_fix() {
        let control = LogControl::new(Arc::default());
        let refused = |request: &LogSetRequest, endpoint: Option<(u16, String)>, text: &str| {
            let said = control.set(request, endpoint).unwrap_err();
            assert!(said.contains(text), "{said}");
            assert!(control.get().remaining_seconds.is_none());
        };
        let web = || Some((7, "default/web".to_owned()));
        refused(&request(&[], 60), None, "write for example inspect=debug");
        refused(&request(&[("x", "debug")], 60), None, "no component 'x'");
        refused(&request(&[("fqdn", "loud")], 60), None, "'loud' is no level");
        refused(
            &request(&[("fqdn", "debug")], 0),
            None,
            "--for must be between 1s and 1d",
        );
        refused(
            &request(&[("fqdn", "debug")], 86_401),
            None,
            "--for must be between",
        );
        refused(
            &request(&[("fqdn", "debug"), ("inspect", "debug")], 60),
            web(),
            "leave out fqdn",
        );
        refused(&request(&[("inspect", "info")], 60), web(), "need inspect=debug");
        assert!(!steps::is_on(Detail::Debug));
    }
}
