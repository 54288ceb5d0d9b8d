//! `palisade policy suggest` on the traffic of the demo: the suggested policies give its attempts the same outcomes.

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    demo::{ATTEMPTS, Attempt, BY_NAME, INSIDE, Row, Verdict, World, attempt_all, attempt_in_turn, examples},
};

/// The only policy of the demo beside the suggested ones: what nothing allows is denied, also for an endpoint of which
/// no allowed flow was recorded.
const DEFAULT_DENY: &str = "default-deny.yaml";

/// Makes all attempts of the demo. Returns those with other outcomes than `expected` returns.
fn different(world: &World, daemon: &Daemon, expected: impl Fn(Verdict) -> Verdict) -> Vec<String> {
    let rows: Vec<(&Attempt, Row)> = ATTEMPTS
        .iter()
        .zip(attempt_all(world, daemon).expect("attempts"))
        .chain([BY_NAME, INSIDE].into_iter().flat_map(|list| {
            list.iter()
                .zip(attempt_in_turn(world, daemon, list).expect("attempts"))
        }))
        .collect();
    assert_eq!(rows.len(), ATTEMPTS.len() + BY_NAME.len() + INSIDE.len());
    let mut different = Vec::new();
    for (attempt, row) in rows {
        for cell in row {
            if cell.verdict != expected(attempt.3) {
                different.push(format!("{attempt:?}: {cell:?}"));
            }
        }
    }
    different
}

#[test]
fn suggested_policies_give_the_demo_its_outcomes() {
    let world = World::new().expect("namespaces");
    let _servers = world.serve().expect("servers");
    let policies = examples().expect("config/examples");
    let start = |policies: &[(&str, &str)]| {
        Daemon::start(&world.topology, &Settings::default(), policies).expect("daemon")
    };
    let borrowed: Vec<(&str, &str)> = policies.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect();
    let daemon = start(&borrowed);
    assert_eq!(different(&world, &daemon, |verdict| verdict), [""; 0]);
    let suggested = daemon.cli(&["policy", "suggest"]).expect("suggest");
    drop(daemon);

    // A new daemon has not learned the names of the first attempts.
    let default_deny = policies.iter().find(|(name, _)| name == DEFAULT_DENY);
    let (name, contents) = default_deny.expect("the default deny of the demo");
    let daemon = start(&[(name, contents), ("suggested.yaml", &suggested)]);
    let expected = |verdict| match verdict {
        // What passed in audit mode is allowed.
        Verdict::Audited => Verdict::Allowed,
        other => other,
    };
    let different = different(&world, &daemon, expected);
    assert!(different.is_empty(), "{different:#?}\n{suggested}");
}
