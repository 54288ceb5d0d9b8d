//! Time from the rename of a policy file into place to the first packet that gets the new verdict.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use palisade_testbed::{
    Topology,
    daemon::{Daemon, Settings},
    topology::{INTERNET_V4, WorkloadSpec},
};

use crate::{
    Effort,
    policies::{allow, files, unused_address},
    progress,
    report::{Goal, Measure, Samples, Table, number},
};

const PORT: u16 = 5_000;
/// Time between two probes, which limits the precision.
const PACE: Duration = Duration::from_micros(100);
/// After this time a change that shows no effect is an error.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Time without a probe after which probes count as dropped.
const SILENCE: Duration = Duration::from_millis(30);

/// Probes that are sent continuously, and which of them arrived.
struct Probes {
    begin: Instant,
    /// When each probe was sent, by its number, since the start.
    sent: Mutex<Vec<Duration>>,
    /// Numbers of those that arrived.
    arrived: Mutex<Vec<usize>>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probes {
    fn new() -> Self {
        Self {
            begin: Instant::now(),
            sent: Mutex::default(),
            arrived: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    fn send(&self, socket: &UdpSocket) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = {
                let mut sent = lock(&self.sent);
                sent.push(self.begin.elapsed());
                sent.len() as u64 - 1
            };
            // A probe that the kernel refuses does not arrive.
            let _ = socket.send(&number.to_be_bytes());
            thread::sleep(PACE);
        }
    }

    fn receive(&self, socket: &UdpSocket) {
        let mut bytes = [0; 8];
        while !self.stop.load(Ordering::Relaxed) {
            if let Ok(8) = socket.recv(&mut bytes) {
                lock(&self.arrived).push(u64::from_be_bytes(bytes) as usize);
            }
        }
    }

    /// Returns when the first probe that arrived was sent, of those sent since `since`.
    fn allowed_since(&self, since: Duration) -> Result<Duration> {
        self.poll("nothing arrives", || {
            let (sent, arrived) = (lock(&self.sent), lock(&self.arrived));
            let times = arrived.iter().rev().map(|number| sent[*number]);
            times.take_while(|time| *time >= since).last()
        })
    }

    /// Returns when the first probe was sent after which none arrived, of those sent since `since`.
    fn denied_since(&self, since: Duration) -> Result<Duration> {
        self.poll("probes still arrive", || {
            let (sent, arrived) = (lock(&self.sent), lock(&self.arrived));
            let first_lost = arrived.last().map_or(0, |last| last + 1);
            let time = (*sent.get(first_lost)?).max(since);
            (*sent.last()? >= time + SILENCE).then_some(time)
        })
    }

    fn poll(&self, problem: &str, mut done: impl FnMut() -> Option<Duration>) -> Result<Duration> {
        let begin = Instant::now();
        loop {
            if let Some(time) = done() {
                return Ok(time);
            }
            ensure!(
                begin.elapsed() < TIMEOUT,
                "{problem} {} s after the change",
                TIMEOUT.as_secs()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let sizes: &[usize] = effort.pick(&[10, 10_000], &[10, 100, 1_000, 10_000]);
    let changes = effort.pick(100, 500);
    let columns = [
        "policies",
        "median, ms",
        "p99, ms",
        "longest, ms",
        "to allowed, median",
        "to denied, median",
    ];
    let mut table = Table::new(
        "From the rename to the first packet that meets the new rule, ms",
        &columns,
    );
    let mut p99 = f64::NAN;
    for &count in sizes {
        progress(format_args!("commit: {changes} changes among {count} policies"));
        let (all, allowed, denied) = changes_among(count, changes)?;
        p99 = all.quantile(0.99);
        table.row(
            number(count as f64),
            &[
                all.median(),
                p99,
                all.quantile(1.0),
                allowed.median(),
                denied.median(),
            ],
        );
    }
    Ok(Measure {
        name: "commit",
        title: "Commit to enforced",
        method: format!(
            "Each policy is a file and selects the same workload. One of them is replaced {changes} times, by turns letting a sender in and not, while the sender sends a packet every {} µs and more; the waiting time of the watched folder is part of the figure.",
            PACE.as_micros()
        ),
        goals: vec![Goal::below(
            "commit to enforced, p99, one rule changed among 10,000",
            20.0,
            p99,
            " ms",
        )],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// Returns times in ms: of all changes, of those that allow, and of those that deny.
fn changes_among(count: usize, changes: usize) -> Result<(Samples, Samples, Samples)> {
    let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
    let server = topology.get("server");
    let files = files(count, "server", &unused_address(count), PORT);
    let policies: Vec<_> = files
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect();
    let unguarded_nic = Settings {
        nic: false,
        ..Settings::default()
    };
    let daemon = Daemon::start(&topology, &unguarded_nic, &policies)?;
    let to = SocketAddr::new(server.v4.into(), PORT);
    let receiver = server.ns.enter(|| UdpSocket::bind(to))?;
    receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
    let sender = topology
        .internet
        .enter(|| UdpSocket::bind(SocketAddr::new(INTERNET_V4.into(), PORT)))?;
    sender.connect(to)?;

    let name = format!("rule-{}", count / 2);
    let probes = Probes::new();
    thread::scope(|scope| {
        scope.spawn(|| probes.send(&sender));
        scope.spawn(|| probes.receive(&receiver));
        let result = (0..changes).try_fold(
            [const { Samples::new() }; 3],
            |[mut all, mut allowed, mut denied], change| -> Result<_> {
                let allow_it = change % 2 == 0;
                let from = if allow_it {
                    INTERNET_V4.to_string()
                } else {
                    unused_address(count / 2)
                };
                let text = allow(&name, "server", &from, PORT);
                let since = probes.begin.elapsed();
                daemon.write(&format!("{name}.yaml"), &text)?;
                let effect = if allow_it {
                    probes.allowed_since(since)?
                } else {
                    probes.denied_since(since)?
                };
                let ms = (effect - since).as_secs_f64() * 1e3;
                all.push(ms);
                if allow_it { &mut allowed } else { &mut denied }.push(ms);
                thread::sleep(Duration::from_millis(20));
                Ok([all, allowed, denied])
            },
        );
        probes.stop.store(true, Ordering::Relaxed);
        let [all, allowed, denied] = result?;
        Ok((all, allowed, denied))
    })
}
