//! The numbers of `palisade top`: counts of flows by talkers, and rates between two states of the daemon.
//!
//! Start at [`Counts::add`] and [`Model::update`].

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use palisade_flowlog::{
    Flow,
    flow::{Endpoint, Verdict},
};

use crate::{
    control::api::{PolicySummary, Status},
    log::printable,
};

/// Number of talkers that are counted. A new talker replaces the one with the fewest flows.
const TALKERS: usize = 256;
/// Longest text of an end of a flow, characters.
const NAME_LENGTH: usize = 64;
/// Number of rules and drop reasons that are kept of one update.
const ROWS: usize = 64;

/// Column by which talkers are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    /// Flow records.
    #[default]
    Flows,
    /// Denied flow records.
    Dropped,
    /// Name of the source, then of the destination.
    Name,
}

/// How talkers are named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Naming {
    /// Endpoint, peer or DNS name, else the address.
    #[default]
    Name,
    /// Labels, else the reserved entity.
    Labels,
}

/// Counts of flow records by verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdicts {
    pub(super) all: u64,
    pub(super) forwarded: u64,
    pub(super) dropped: u64,
    pub(super) audit: u64,
}

impl Verdicts {
    fn add(&mut self, verdict: Verdict) {
        self.all += 1;
        match verdict {
            Verdict::Forwarded => self.forwarded += 1,
            Verdict::Dropped | Verdict::Error => self.dropped += 1,
            Verdict::Audit => self.audit += 1,
            _ => {}
        }
    }
}

/// Counts of all flow records since the start or the last reset.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) verdicts: Verdicts,
    /// Flow records that were overwritten before this command could read them.
    pub(super) lost: u64,
    talkers: HashMap<(String, String), Verdicts>,
    naming: Naming,
}

impl Counts {
    /// Returns empty counts.
    pub(super) fn new(naming: Naming) -> Self {
        Self {
            naming,
            ..Self::default()
        }
    }

    pub(super) const fn naming(&self) -> Naming {
        self.naming
    }

    /// Counts a flow record.
    ///
    /// The talkers are those of the Space-Saving algorithm: if the table is full, a new one takes the place and the
    /// count of the one with the fewest flows. So a count can be too high, but no talker with more than 1/256 of all
    /// flows is missing, and the memory is bounded whatever addresses peers use.
    pub(super) fn add(&mut self, flow: &Flow) {
        self.verdicts.add(flow.verdict);
        let address = |source: bool| {
            flow.ip
                .as_ref()
                .map(|ip| if source { ip.source } else { ip.destination }.to_string())
        };
        let key = (
            name(self.naming, &flow.source, &flow.source_names, address(true)),
            name(
                self.naming,
                &flow.destination,
                &flow.destination_names,
                address(false),
            ),
        );
        if let Some(counts) = self.talkers.get_mut(&key) {
            counts.add(flow.verdict);
            return;
        }
        let mut counts = Verdicts::default();
        if self.talkers.len() >= TALKERS {
            let fewest = self.talkers.iter().min_by_key(|(_, counts)| counts.all);
            if let Some((key, all)) = fewest.map(|(key, counts)| (key.clone(), counts.all)) {
                self.talkers.remove(&key);
                counts.all = all;
            }
        }
        counts.add(flow.verdict);
        self.talkers.insert(key, counts);
    }

    /// Returns the talkers in their order, at most `count`.
    pub(super) fn talkers(&self, sort: Sort, count: usize) -> Vec<Talker> {
        let mut talkers: Vec<Talker> = self
            .talkers
            .iter()
            .map(|((source, destination), counts)| Talker {
                source: source.clone(),
                destination: destination.clone(),
                counts: *counts,
            })
            .collect();
        talkers.sort_by(|a, b| {
            let by_name = (&a.source, &a.destination).cmp(&(&b.source, &b.destination));
            match sort {
                Sort::Flows => b.counts.all.cmp(&a.counts.all).then(by_name),
                Sort::Dropped => b.counts.dropped.cmp(&a.counts.dropped).then(by_name),
                Sort::Name => by_name,
            }
        });
        talkers.truncate(count);
        talkers
    }
}

/// Source and destination of flows, and their counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Talker {
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) counts: Verdicts,
}

/// Returns the name of an end of a flow. Control characters are escaped, since some names come from peers.
fn name(naming: Naming, end: &Endpoint, names: &[std::sync::Arc<str>], address: Option<String>) -> String {
    let labels = || -> Vec<&str> {
        end.labels
            .iter()
            .map(|label| label.strip_prefix("k8s:").unwrap_or(label))
            .filter(|label| !label.starts_with("io.") && !label.starts_with("cidr:"))
            .collect()
    };
    let text = match naming {
        Naming::Labels if !end.labels.is_empty() => labels().join(","),
        _ if !end.pod_name.is_empty() && !end.namespace.is_empty() => {
            format!("{}/{}", end.namespace, end.pod_name)
        }
        _ if !end.pod_name.is_empty() => end.pod_name.to_string(),
        _ => match (names.first(), address) {
            (Some(name), _) => name.to_string(),
            (None, Some(address)) => address,
            (None, None) => "not IP".to_owned(),
        },
    };
    let short: String = text.chars().take(NAME_LENGTH).collect();
    printable(&short)
}

/// A rate and a total.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rate {
    pub(super) text: String,
    /// Per second, in the last interval.
    pub(super) rate: f64,
    pub(super) total: u64,
}

/// A worker.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WorkerRow {
    pub(super) number: usize,
    pub(super) state: String,
    /// Received and reinjected packets per second.
    pub(super) packets_in: f64,
    pub(super) packets_out: f64,
    pub(super) held: u64,
    pub(super) flows: u64,
    pub(super) dropped: u64,
}

/// What a screen shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    pub(super) node: String,
    pub(super) uptime: u64,
    pub(super) is_ready: bool,
    /// Why there are no newer numbers; `None` if the daemon answers.
    pub(super) problem: Option<String>,
    pub(super) is_paused: bool,
    pub(super) sort: Sort,
    pub(super) naming: Naming,
    /// Flow records per second in the last interval.
    pub(super) flows: f64,
    pub(super) verdicts: Verdicts,
    pub(super) lost: u64,
    /// Entries and capacity of the conntrack map.
    pub(super) conntrack: (u64, u64),
    /// Events that the programs did not send.
    pub(super) suppressed: u64,
    pub(super) talkers: Vec<Talker>,
    pub(super) rules: Vec<Rate>,
    pub(super) drops: Vec<Rate>,
    pub(super) workers: Vec<WorkerRow>,
    before: Before,
}

/// Totals of the last update.
#[derive(Clone, Debug, Default, PartialEq)]
struct Before {
    flows: u64,
    rules: BTreeMap<u32, u64>,
    drops: BTreeMap<(u8, String), u64>,
    workers: BTreeMap<usize, (u64, u64)>,
}

impl Model {
    /// Sorts the talkers.
    pub(super) fn sort(&mut self, sort: Sort, counts: &Counts) {
        self.sort = sort;
        self.talkers = counts.talkers(sort, TALKERS);
    }

    /// Sets the counts of flow records to zero.
    pub(super) fn reset(&mut self, naming: Naming) {
        self.naming = naming;
        self.talkers = Vec::new();
        self.verdicts = Verdicts::default();
        (self.lost, self.flows, self.before.flows) = (0, 0.0, 0);
    }

    /// Takes new numbers. `time`: time since the last update; `Duration::ZERO` at the first one, whose rates are 0.
    pub(super) fn update(
        &mut self,
        status: &Status,
        policies: &[PolicySummary],
        counts: &Counts,
        time: Duration,
    ) {
        let before = std::mem::take(&mut self.before);
        // The totals of a daemon that has been started again are lower than before.
        let rate = |now: u64, before: Option<u64>| match before {
            Some(before) if !time.is_zero() => now.saturating_sub(before) as f64 / time.as_secs_f64(),
            _ => 0.0,
        };
        self.node = printable(&status.node);
        self.uptime = status.uptime_seconds;
        self.is_ready = status.ready;
        self.problem = None;
        self.flows = rate(counts.verdicts.all, Some(before.flows));
        self.before.flows = counts.verdicts.all;
        self.verdicts = counts.verdicts;
        self.lost = counts.lost;
        self.naming = counts.naming();
        self.talkers = counts.talkers(self.sort, TALKERS);
        self.conntrack = (status.conntrack.entries, status.conntrack.capacity);
        self.suppressed = status.events.suppressed + status.events.lost;
        self.rules = Vec::new();
        for rule in policies.iter().flat_map(|policy| &policy.rules) {
            if rule.packets == 0 || self.before.rules.insert(rule.id, rule.packets).is_some() {
                continue;
            }
            self.rules.push(Rate {
                text: printable(rule.rule.strip_prefix("policy ").unwrap_or(&rule.rule)),
                rate: rate(rule.packets, before.rules.get(&rule.id).copied().or(Some(0))),
                total: rule.packets,
            });
        }
        self.drops = Vec::new();
        for drop in &status.drops {
            let key = (drop.reason, drop.direction.clone());
            self.drops.push(Rate {
                text: format!("{} {} ({})", drop.direction, drop.text, drop.reason),
                rate: rate(drop.packets, before.drops.get(&key).copied().or(Some(0))),
                total: drop.packets,
            });
            self.before.drops.insert(key, drop.packets);
        }
        for rows in [&mut self.rules, &mut self.drops] {
            rows.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(b.total.cmp(&a.total)));
            rows.truncate(ROWS);
        }
        self.workers = Vec::new();
        for worker in &status.workers.workers {
            let last = before.workers.get(&worker.number);
            self.workers.push(WorkerRow {
                number: worker.number,
                state: worker.state.clone(),
                packets_in: rate(worker.packets_in, last.map(|last| last.0)),
                packets_out: rate(worker.packets_out, last.map(|last| last.1)),
                held: worker.held,
                flows: worker.flows,
                dropped: worker.drops.iter().map(|drop| drop.packets).sum(),
            });
            let now = (worker.packets_in, worker.packets_out);
            self.before.workers.insert(worker.number, now);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::api::{DropCount, RuleSummary, Worker};

    fn flow(source: &str, destination: &str, verdict: Verdict) -> Flow {
        let end = |name: &str| Endpoint {
            pod_name: name.into(),
            namespace: "default".into(),
            ..Endpoint::default()
        };
        Flow {
            verdict,
            source: end(source),
            destination: end(destination),
            ..Flow::default()
        }
    }

    /// Returns a model of a busy node after an interval of two seconds.
    pub(in super::super) fn busy() -> Model {
        let mut counts = Counts::new(Naming::Name);
        let mut model = Model::default();
        let mut status = Status {
            node: "node1".into(),
            uptime_seconds: 3_723,
            ready: true,
            ..Status::default()
        };
        (status.conntrack.entries, status.conntrack.capacity) = (1_234, 262_144);
        let drops = |packets| DropCount {
            reason: 133,
            text: "Policy denied".into(),
            direction: "ingress".into(),
            packets,
            bytes: packets * 60,
        };
        let worker = |packets| Worker {
            number: 0,
            state: "running".into(),
            packets_in: packets,
            packets_out: packets,
            held: 3,
            flows: 12,
            ..Worker::default()
        };
        let policies = |packets| {
            vec![PolicySummary {
                rules: vec![RuleSummary {
                    id: 7,
                    rule: "policy default/web ingress rule 1".into(),
                    packets,
                    ..RuleSummary::default()
                }],
                ..PolicySummary::default()
            }]
        };
        status.drops = vec![drops(10)];
        status.workers.workers = vec![worker(1_000)];
        model.update(&status, &policies(100), &counts, Duration::ZERO);
        for _ in 0..400 {
            counts.add(&flow("front", "web", Verdict::Forwarded));
        }
        for _ in 0..20 {
            counts.add(&flow("db", "web", Verdict::Dropped));
        }
        counts.add(&flow("x\x1b[2Jy", "web", Verdict::Audit));
        counts.lost = 5;
        status.drops = vec![drops(30)];
        status.workers.workers = vec![worker(5_000)];
        model.update(&status, &policies(900), &counts, Duration::from_secs(2));
        model
    }

    #[test]
    fn rates_are_those_of_the_last_interval() {
        let model = busy();
        assert!((model.flows - 210.5).abs() < 0.01, "{}", model.flows);
        assert_eq!(
            model.verdicts,
            Verdicts {
                all: 421,
                forwarded: 400,
                dropped: 20,
                audit: 1
            }
        );
        assert_eq!((model.rules[0].rate, model.rules[0].total), (400.0, 900));
        assert_eq!((model.drops[0].rate, model.drops[0].total), (10.0, 30));
        assert_eq!(model.workers[0].packets_in, 2_000.0);
    }

    #[test]
    fn talkers_are_sorted_and_their_names_harmless() {
        let mut counts = Counts::new(Naming::Name);
        counts.add(&flow("b", "web", Verdict::Dropped));
        counts.add(&flow("a", "web", Verdict::Forwarded));
        counts.add(&flow("a", "web", Verdict::Forwarded));
        counts.add(&flow("c\x1b[31m\n", "web", Verdict::Forwarded));
        let order = |sort| -> Vec<String> {
            let talkers = counts.talkers(sort, 10);
            talkers.into_iter().map(|talker| talker.source).collect()
        };
        let c = "default/c\\u{1b}[31m\\n";
        assert_eq!(order(Sort::Flows), ["default/a", "default/b", c]);
        assert_eq!(order(Sort::Dropped), ["default/b", "default/a", c]);
        assert_eq!(order(Sort::Name), ["default/a", "default/b", c]);
        assert_eq!(counts.talkers(Sort::Flows, 1).len(), 1);
    }

    #[test]
    fn labels_or_addresses_name_ends_without_a_name() {
        let mut labelled = flow("", "", Verdict::Forwarded);
        labelled.source.labels = [
            "k8s:app=web",
            "k8s:io.kubernetes.pod.namespace=x",
            "reserved:host",
        ]
        .map(Into::into)
        .into();
        let source = |naming| {
            let mut counts = Counts::new(naming);
            counts.add(&labelled);
            counts.talkers(Sort::Flows, 1).remove(0).source
        };
        assert_eq!(source(Naming::Labels), "app=web,reserved:host");
        assert_eq!(source(Naming::Name), "not IP");
    }

    #[test]
    fn peers_cannot_fill_the_memory_and_a_frequent_talker_stays() {
        let mut counts = Counts::new(Naming::Name);
        for number in 0..10_000 {
            counts.add(&flow(&format!("peer{number}"), "web", Verdict::Forwarded));
            counts.add(&flow("busy", "web", Verdict::Forwarded));
        }
        assert_eq!(counts.talkers.len(), TALKERS);
        let first = counts.talkers(Sort::Flows, 1).remove(0);
        assert_eq!(
            (first.source.as_str(), first.counts.all),
            ("default/busy", 10_000)
        );
    }
}
