//! `palisade top`: flows per second, verdicts, talkers, rules, drops and workers, as they change.
//!
//! A thread follows the flows of the daemon and counts them (`model`); the command's own thread requests the status
//! and draws the screen (`screen`).

mod model;
mod screen;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::model::{Counts, Model, Naming, Sort};
use super::output::EXIT_OK;
use crate::{
    cli::top::TopArgs,
    control::{
        api::{Answer, ObserveRequest, PolicySummary, Request, Status},
        client::{Client, ClientError, ask},
    },
    text::chain,
};

/// Shortest time between two screens.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// Longest time until a signal is handled.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(200);
/// Wait before a new connection to a daemon that has ended.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Size of the screen of `--once`.
const ONCE_SIZE: (u16, u16) = (80, 24);

/// Runs `palisade top`.
pub(super) fn run(socket: &Path, args: &TopArgs) -> anyhow::Result<u8> {
    let is_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if !args.once && !is_terminal {
        bail!("the output is not a terminal: `palisade top --once` prints one screen");
    }
    let interval = args.interval.max(MIN_INTERVAL);
    let mut top = Top::start(socket)?;
    if args.once {
        thread::sleep(interval);
        top.update();
        if let Some(problem) = &top.model.problem {
            bail!("{problem}");
        }
        let (width, height) = ONCE_SIZE;
        let mut out = io::stdout().lock();
        for line in screen::lines(&top.model, width, height - 1) {
            writeln!(out, "{line}")?;
        }
        return Ok(EXIT_OK);
    }
    let is_ended = Arc::<AtomicBool>::default();
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&is_ended)).context("signals")?;
    }
    // `try_init` also restores the terminal if this program panics.
    let mut terminal = ratatui::try_init().context("the terminal")?;
    let shown = top.show(&mut terminal, interval, &is_ended);
    ratatui::try_restore().context("the terminal")?;
    shown?;
    Ok(EXIT_OK)
}

struct Top {
    socket: PathBuf,
    counts: Arc<Mutex<Counts>>,
    model: Model,
    /// Time of the last update.
    updated: Instant,
}

impl Top {
    /// Starts to count flows.
    fn start(socket: &Path) -> anyhow::Result<Self> {
        let mut top = Self {
            socket: socket.to_owned(),
            counts: Arc::default(),
            model: Model::default(),
            updated: Instant::now(),
        };
        let follower = follow(socket)?;
        let (counts, path) = (Arc::clone(&top.counts), socket.to_owned());
        thread::Builder::new().name("flows".into()).spawn(move || {
            count(follower, &counts);
            loop {
                thread::sleep(RETRY_INTERVAL);
                if let Ok(follower) = follow(&path) {
                    count(follower, &counts);
                }
            }
        })?;
        let (status, policies) = top.ask()?;
        top.model
            .update(&status, &policies, &lock(&top.counts), Duration::ZERO);
        Ok(top)
    }

    fn ask(&self) -> Result<(Status, Vec<PolicySummary>), ClientError> {
        let status = ask(&self.socket, &Request::Status)?;
        let policies = ask(&self.socket, &Request::PolicyGet { name: None })?;
        Ok((status, policies))
    }

    /// Takes new numbers from the daemon.
    fn update(&mut self) {
        match self.ask() {
            Ok((status, policies)) => {
                let time = self.updated.elapsed();
                self.updated = Instant::now();
                self.model.update(&status, &policies, &lock(&self.counts), time);
            }
            Err(error) => self.model.problem = Some(chain(&error.into())),
        }
    }

    fn show(
        &mut self,
        terminal: &mut DefaultTerminal,
        interval: Duration,
        is_ended: &AtomicBool,
    ) -> anyhow::Result<()> {
        let colour = std::env::var_os("NO_COLOR").is_none();
        let mut due = Instant::now() + interval;
        loop {
            terminal.draw(|frame| {
                let area = frame.area();
                screen::draw(&self.model, area, frame.buffer_mut(), colour);
            })?;
            loop {
                if is_ended.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let left = due.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    due = Instant::now() + interval;
                    if !self.model.is_paused {
                        self.update();
                    }
                    break;
                }
                if !event::poll(left.min(SIGNAL_INTERVAL))? {
                    continue;
                }
                match event::read()? {
                    Event::Key(key) if key.kind != KeyEventKind::Release => {
                        if !self.key(key) {
                            return Ok(());
                        }
                    }
                    Event::Resize(..) => {}
                    _ => continue,
                }
                break;
            }
        }
    }

    /// Handles a key. Returns whether the command continues.
    fn key(&mut self, key: KeyEvent) -> bool {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if is_control => return false,
            KeyCode::Char('p' | ' ') => self.model.is_paused = !self.model.is_paused,
            KeyCode::Char('f') => self.sort(Sort::Flows),
            KeyCode::Char('d') => self.sort(Sort::Dropped),
            KeyCode::Char('n') => self.sort(Sort::Name),
            KeyCode::Char('l') => {
                let naming = match self.model.naming {
                    Naming::Name => Naming::Labels,
                    Naming::Labels => Naming::Name,
                };
                self.reset(naming);
            }
            KeyCode::Char('r') => self.reset(self.model.naming),
            _ => {}
        }
        true
    }

    fn sort(&mut self, sort: Sort) {
        self.model.sort(sort, &lock(&self.counts));
    }

    /// Sets all counts to zero.
    fn reset(&mut self, naming: Naming) {
        *lock(&self.counts) = Counts::new(naming);
        self.model.reset(naming);
    }
}

/// Requests the flows that arrive from now on.
fn follow(socket: &Path) -> Result<Client, ClientError> {
    let request = ObserveRequest {
        follow: true,
        last: Some(0),
        ..ObserveRequest::default()
    };
    Client::send(socket, &Request::Observe(request))
}

/// Counts flows until the daemon ends or disconnects this command.
fn count(mut follower: Client, counts: &Mutex<Counts>) {
    loop {
        match follower.next() {
            Ok(Some(Answer::Flow(flow))) => lock(counts).add(&flow),
            Ok(Some(Answer::Lost(report))) => lock(counts).lost += report.count,
            Ok(Some(Answer::Alive)) => {}
            Ok(Some(_) | None) | Err(_) => return,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
