//! A client that writes its segments itself, against a server that keeps every byte: in whatever way bytes come, the
//! server gets what the policy allows, unchanged, and nothing else.

use std::thread;

use palisade_testbed::{
    Daemon,
    daemon::{Hooks, Settings},
    recorder::Recorder,
    tls::{Hello, server_hello},
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    apps::{Apps, apps, borrowed, policies},
    games::{Field, Streams},
};

const PORT: u16 = 443;

/// Two hellos that differ in the name only.
fn hellos() -> Streams {
    let hello = |name: &str| Hello::to(name).with(16, b"\x00\x09\x08http/1.1").bytes();
    Streams::new(hello("good.example"), hello("evil.example"), server_hello())
}

struct Arena {
    // in this order: the daemon goes before the world
    daemon: Daemon,
    recorders: Vec<(&'static str, Recorder)>,
    apps: Apps,
    streams: Streams,
}

const NAMES: &str = "      serverNames: [good.example]\n";

impl Arena {
    fn tls(hooks: Hooks, rules: &str) -> Self {
        let apps = apps();
        let streams = hellos();
        let recorders = ["server", "node", "internet"]
            .into_iter()
            .map(|name| {
                let (length, said) = (streams.good.len(), streams.answer.clone());
                let answer = move |dealt_with: &mut usize, all: &[u8]| {
                    if *dealt_with == 0 && all.len() >= length {
                        *dealt_with = length;
                        return said.clone();
                    }
                    Vec::new()
                };
                let recorder = Recorder::start(apps.ns(name), &apps.both(name), &[PORT], answer);
                (name, recorder.expect("recorder"))
            })
            .collect();
        let settings = Settings {
            hooks,
            ..Settings::default()
        };
        let daemon = apps
            .daemon(&settings, &borrowed(&policies(&[PORT], rules)))
            .expect("daemon");
        Self {
            daemon,
            recorders,
            apps,
            streams,
        }
    }

    fn field(&self, from: &str, to: &str, family: Family) -> Field<'_> {
        let recorder = self.recorders.iter().find(|(name, _)| *name == to);
        Field {
            ns: self.apps.ns(from),
            source: self.apps.source(from, to, family),
            to: self.apps.at(to, family, PORT),
            recorder: &recorder.expect("recorder").1,
            streams: &self.streams,
        }
    }

    /// Plays on several ways at the same time, in both families. What has failed.
    fn outcome(&self, ways: &[(&str, &str)], game: fn(&Field<'_>) -> Vec<String>) -> Vec<String> {
        thread::scope(|scope| {
            let threads: Vec<_> = ways
                .iter()
                .flat_map(|(from, to)| FAMILIES.map(|family| (*from, *to, family)))
                .map(|(from, to, family)| scope.spawn(move || game(&self.field(from, to, family))))
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    #[track_caller]
    fn play(&self, ways: &[(&str, &str)], game: fn(&Field<'_>) -> Vec<String>) {
        let failures = self.outcome(ways, game);
        assert!(
            failures.is_empty(),
            "{} failures\n{}\n{}",
            failures.len(),
            failures.join("\n"),
            self.daemon.report()
        );
    }
}

/// Out of a workload and into one, into the node and out of it.
const FOUR: &[(&str, &str)] = &[
    ("client", "internet"),
    ("internet", "server"),
    ("internet", "node"),
    ("node", "internet"),
];

#[test]
fn a_hello_cut_in_every_odd_way_is_judged_alike() {
    Arena::tls(Hooks::default(), NAMES).play(FOUR, |field| field.cuts());
}

#[test]
fn a_hello_split_anywhere_is_judged_alike() {
    Arena::tls(Hooks::default(), NAMES).play(&[("client", "internet"), ("internet", "node")], |field| {
        field.splits()
    });
}

#[test]
fn who_mixes_two_hellos_brings_through_none_that_is_denied() {
    Arena::tls(Hooks::default(), NAMES).play(FOUR, |field| field.mixes());
}

#[test]
fn without_a_rule_for_names_the_mixtures_do_bring_both_through() {
    // else the other tests would prove nothing
    let failures = Arena::tls(Hooks::default(), "").outcome(&FOUR[..1], |field| field.mixes());
    assert!(
        failures.len() > 60,
        "{} of them\n{}",
        failures.len(),
        failures.join("\n")
    );
}
