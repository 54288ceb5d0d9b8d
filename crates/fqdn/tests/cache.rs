//! The cache, case by case: learned addresses, their lifetime, limits, and restarts.

use std::{net::IpAddr, sync::Arc};

use palisade_fqdn::{
    Cache, ChangeKind, Config, EndpointId, ListedPrefixes, Millis, Pending, SavedName, SelectorId, Selectors,
    Special, Uncommitted, Update,
};
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Address, Answer, Question, Source, rtype};

const EVERYTHING: &[(u32, &str)] = &[(1, "*")];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn answer(name: &str, ttl: u32, addresses: &[&str]) -> Answer {
    Answer {
        question: Some(Question {
            name: name.parse().unwrap(),
            rtype: rtype::A,
            class: 1,
        }),
        addresses: addresses
            .iter()
            .map(|text| Address {
                ip: ip(text),
                ttl,
                source: Source::Record,
            })
            .collect(),
        ttl: (!addresses.is_empty()).then_some(ttl),
        ..Answer::default()
    }
}

fn selectors(patterns: &[(u32, &str)]) -> Arc<Selectors> {
    let patterns: Vec<_> = patterns
        .iter()
        .map(|(id, text)| {
            let text = (*text).to_owned();
            (
                SelectorId(*id),
                if text.contains('*') {
                    FqdnPattern::Pattern(text)
                } else {
                    FqdnPattern::Name(text)
                },
            )
        })
        .collect();
    Arc::new(Selectors::new(patterns.iter().map(|(id, pattern)| (*id, pattern))).unwrap())
}

fn cache(config: Config, patterns: &[(u32, &str)]) -> Cache {
    let mut cache = Cache::new(config);
    let update = cache.set_selectors(1, selectors(patterns));
    assert!(update.changes().is_empty());
    cache.written(update);
    cache
}

type Flat = (ChangeKind, EndpointId, u32, String);

fn flat(changes: &[palisade_fqdn::Change]) -> Vec<Flat> {
    let mut flat: Vec<_> = changes
        .iter()
        .map(|change| {
            (
                change.kind,
                change.endpoint,
                change.selector.0,
                change.address.to_string(),
            )
        })
        .collect();
    flat.sort_by(|a, b| (a.1, a.2, &a.3).cmp(&(b.1, b.2, &b.3)));
    flat
}

fn live(endpoint: EndpointId, selector: u32, address: &str) -> Flat {
    (ChangeKind::Live, endpoint, selector, address.to_owned())
}

fn gone(endpoint: EndpointId, selector: u32, address: &str) -> Flat {
    (ChangeKind::Gone, endpoint, selector, address.to_owned())
}

fn release(cache: &mut Cache, pending: Pending) {
    let number = pending.number();
    assert_eq!(cache.commit(pending).unwrap().number(), number);
}

/// Learns and commits an answer. Returns the changes.
fn learn(cache: &mut Cache, endpoint: EndpointId, answer: &Answer, now: Millis) -> Vec<Flat> {
    let pending = cache.learn(endpoint, answer, now);
    let changes = flat(pending.changes());
    release(cache, pending);
    changes
}

fn done(cache: &mut Cache, update: Update) -> Vec<Flat> {
    let changes = flat(update.changes());
    cache.written(update);
    changes
}

fn sweep(cache: &mut Cache, now: Millis) -> Vec<Flat> {
    let update = cache.sweep(1, now);
    done(cache, update)
}

#[test]
fn addresses_are_learned_per_endpoint() {
    let mut cache = cache(Config::default(), &[(1, "a.test"), (2, "*.test"), (3, "b.test")]);
    let update = cache.set_selectors(2, selectors(&[(1, "a.test")]));
    cache.written(update);
    let a = answer("A.test", 60, &["192.0.2.1", "2001:db8::1"]);
    assert_eq!(
        learn(&mut cache, 1, &a, 0),
        [
            live(1, 1, "192.0.2.1"),
            live(1, 1, "2001:db8::1"),
            live(1, 2, "192.0.2.1"),
            live(1, 2, "2001:db8::1"),
        ]
    );
    // The same answer again changes nothing.
    assert_eq!(learn(&mut cache, 1, &a, 10), []);
    // The other endpoint learns the address only by an answer of its own.
    assert_eq!(
        learn(&mut cache, 2, &answer("a.test", 60, &["192.0.2.1"]), 10),
        [live(2, 1, "192.0.2.1")]
    );
    assert_eq!(cache.name_of(1, ip("192.0.2.1")).unwrap().to_string(), "a.test");
    assert_eq!(cache.name_of(2, ip("2001:db8::1")), None);
}

#[test]
fn error_responses_add_no_address() {
    let mut cache = cache(Config::default(), EVERYTHING);
    let mut failed = answer("a.test", 60, &["192.0.2.1"]);
    failed.rcode = 3;
    let mut chaos = answer("a.test", 60, &["192.0.2.1"]);
    chaos.question.as_mut().unwrap().class = 3;
    for answer in [failed, chaos, answer("a.test", 60, &[])] {
        assert_eq!(learn(&mut cache, 1, &answer, 0), []);
    }
    assert_eq!(cache.memory().names, 0);
}

#[test]
fn ipv4_mapped_addresses_are_learned_as_ipv4() {
    let mut cache = cache(Config::default(), EVERYTHING);
    let a = answer("a.test", 60, &["::ffff:192.0.2.1", "192.0.2.1"]);
    assert_eq!(learn(&mut cache, 1, &a, 0), [live(1, 1, "192.0.2.1")]);
}

#[test]
fn a_time_to_live_of_zero_gets_the_minimum() {
    let mut cache = cache(
        Config {
            min_ttl: 5000,
            ..Config::default()
        },
        EVERYTHING,
    );
    learn(&mut cache, 1, &answer("a.test", 0, &["192.0.2.1"]), 1000);
    assert_eq!(cache.list(None, 1000)[0].addresses[0].left, Some(5000));
    for now in [2000, 4000, 5999] {
        assert_eq!(sweep(&mut cache, now), []);
    }
    assert_eq!(sweep(&mut cache, 6000), []);
    assert_eq!(sweep(&mut cache, 6001), [gone(1, 1, "192.0.2.1")]);
}

#[test]
fn an_expired_address_is_removed_after_two_sweeps_without_use() {
    let mut cache = cache(Config::default(), EVERYTHING);
    learn(
        &mut cache,
        1,
        &answer("a.test", 60, &["192.0.2.1", "192.0.2.2"]),
        0,
    );
    for now in 60_000..60_010 {
        cache.mark_in_use(1, [ip("192.0.2.1"), ip("192.0.2.99")]);
        let expected = if now == 60_001 {
            vec![gone(1, 1, "192.0.2.2")]
        } else {
            vec![]
        };
        assert_eq!(sweep(&mut cache, now), expected);
    }
    assert_eq!(sweep(&mut cache, 70_000), []);
    // The address is in use once more, so its count of unused sweeps starts again.
    cache.mark_in_use(1, [ip("192.0.2.1")]);
    assert_eq!(sweep(&mut cache, 70_001), []);
    assert_eq!(sweep(&mut cache, 70_002), []);
    assert_eq!(sweep(&mut cache, 70_003), [gone(1, 1, "192.0.2.1")]);
    assert_eq!(cache.stats().expired, 2);
}

#[test]
fn an_address_of_two_names_remains_until_both_are_removed() {
    let mut cache = cache(Config::default(), &[(1, "*.a.test"), (2, "z.test")]);
    assert_eq!(
        learn(&mut cache, 1, &answer("x.a.test", 60, &["192.0.2.1"]), 0),
        [live(1, 1, "192.0.2.1")]
    );
    assert_eq!(
        learn(&mut cache, 1, &answer("y.a.test", 90, &["192.0.2.1"]), 0),
        []
    );
    assert_eq!(
        learn(&mut cache, 1, &answer("z.test", 60, &["192.0.2.1"]), 0),
        [live(1, 2, "192.0.2.1")]
    );
    assert_eq!(sweep(&mut cache, 60_000), []);
    // x.a.test and z.test are removed; y.a.test keeps selector 1.
    assert_eq!(sweep(&mut cache, 60_001), [gone(1, 2, "192.0.2.1")]);
    assert_eq!(sweep(&mut cache, 90_000), []);
    assert_eq!(sweep(&mut cache, 90_001), [gone(1, 1, "192.0.2.1")]);
}

#[test]
fn aliases_are_learned_only_if_configured() {
    for aliases in [false, true] {
        let config = Config {
            aliases,
            ..Config::default()
        };
        let mut cache = cache(config, &[(1, "www.shop.test"), (2, "*.cdn.test")]);
        let mut a = answer("www.shop.test", 60, &["192.0.2.1"]);
        a.aliases = vec!["lb.cdn.test".parse().unwrap(), "edge.cdn.test".parse().unwrap()];
        let mut expected = vec![live(1, 1, "192.0.2.1")];
        if aliases {
            // There is one change for each of the two names that match.
            expected.extend([live(1, 2, "192.0.2.1"), live(1, 2, "192.0.2.1")]);
        }
        assert_eq!(learn(&mut cache, 1, &a, 0), expected);
    }
}

#[test]
fn the_limit_of_a_name_evicts_the_oldest_unused_address() {
    let config = Config {
        addresses_per_name: 2,
        ..Config::default()
    };
    let mut cache = cache(config, EVERYTHING);
    learn(&mut cache, 1, &answer("a.test", 60, &["192.0.2.1"]), 0);
    learn(&mut cache, 1, &answer("a.test", 60, &["192.0.2.2"]), 1);
    cache.mark_in_use(1, [ip("192.0.2.1")]);
    let changes = learn(&mut cache, 1, &answer("a.test", 60, &["192.0.2.3"]), 2);
    assert_eq!(changes, [gone(1, 1, "192.0.2.2"), live(1, 1, "192.0.2.3")]);
    cache.mark_in_use(1, [ip("192.0.2.3")]);
    let pending = cache.learn(1, &answer("a.test", 60, &["192.0.2.4"]), 3);
    assert_eq!((pending.refused(), pending.changes().len()), (1, 0));
    release(&mut cache, pending);
    assert_eq!((cache.stats().evicted, cache.stats().refused), (1, 1));
    // An answer larger than the limit does not evict its own addresses.
    let pending = cache.learn(
        1,
        &answer("b.test", 60, &["192.0.2.5", "192.0.2.6", "192.0.2.7"]),
        4,
    );
    assert_eq!((pending.refused(), pending.changes().len()), (1, 2));
    release(&mut cache, pending);
}

#[test]
fn the_limit_of_an_endpoint_does_not_touch_others() {
    let config = Config {
        addresses_per_endpoint: 2,
        ..Config::default()
    };
    let mut cache = cache(config, EVERYTHING);
    let update = cache.set_selectors(2, selectors(EVERYTHING));
    cache.written(update);
    learn(&mut cache, 2, &answer("a.test", 60, &["192.0.2.1"]), 0);
    learn(&mut cache, 1, &answer("a.test", 60, &["192.0.2.1"]), 1);
    learn(&mut cache, 1, &answer("b.test", 60, &["192.0.2.2"]), 2);
    learn(&mut cache, 1, &answer("a.test", 60, &["192.0.2.1"]), 3);
    let changes = learn(&mut cache, 1, &answer("c.test", 60, &["192.0.2.3"]), 4);
    assert_eq!(changes, [gone(1, 1, "192.0.2.2"), live(1, 1, "192.0.2.3")]);
    cache.mark_in_use(1, [ip("192.0.2.1"), ip("192.0.2.3")]);
    for _ in 0..3 {
        let pending = cache.learn(1, &answer("d.test", 60, &["192.0.2.4"]), 5);
        assert_eq!(pending.refused(), 1);
        release(&mut cache, pending);
    }
    assert_eq!(cache.list(Some(1), 5).len(), 2);
    // After two sweeps the addresses are no longer in use.
    sweep(&mut cache, 6);
    sweep(&mut cache, 7);
    assert_eq!(
        learn(&mut cache, 1, &answer("d.test", 60, &["192.0.2.4"]), 8).len(),
        2
    );
}

#[test]
fn an_answer_waits_for_the_changes_of_a_new_policy() {
    let mut cache = cache(Config::default(), &[(1, "a.test")]);
    let pending = cache.learn(1, &answer("a.test", 60, &["192.0.2.1"]), 0);
    let update = cache.set_selectors(1, selectors(&[(2, "*.test")]));
    assert_eq!(
        flat(update.changes()),
        [gone(1, 1, "192.0.2.1"), live(1, 2, "192.0.2.1")]
    );
    // The changes of the policy are not in the maps yet.
    let Err(Uncommitted::Missing(pending)) = cache.commit(pending) else {
        panic!("released too early")
    };
    assert_eq!(flat(pending.changes()), [live(1, 2, "192.0.2.1")]);
    cache.written(update);
    release(&mut cache, pending);
}

#[test]
fn an_answer_waits_for_the_same_changes_of_another_answer() {
    let mut cache = cache(Config::default(), EVERYTHING);
    let a = answer("a.test", 60, &["192.0.2.1"]);
    let first = cache.learn(1, &a, 0);
    let second = cache.learn(1, &a, 1);
    assert_eq!(flat(second.changes()), [live(1, 1, "192.0.2.1")]);
    cache.abort(first);
    // The second answer can still be committed.
    release(&mut cache, second);
    assert_eq!(learn(&mut cache, 1, &a, 2), []);
}

#[test]
fn an_answer_with_a_cleaned_address_is_not_released() {
    let mut cache = cache(Config::default(), EVERYTHING);
    let pending = cache.learn(1, &answer("a.test", 60, &["192.0.2.1"]), 0);
    let update = cache.clean(None, |name| name.to_string() == "a.test");
    assert!(matches!(cache.commit(pending), Err(Uncommitted::Superseded)));
    assert_eq!(done(&mut cache, update), [gone(1, 1, "192.0.2.1")]);
    assert_eq!((cache.stats().cleaned, cache.stats().superseded), (1, 1));
    assert_eq!(cache.memory().triples, 0);
}

#[test]
fn changes_that_were_not_written_are_repeated() {
    let mut cache = cache(Config::default(), EVERYTHING);
    let pending = cache.learn(1, &answer("a.test", 60, &["192.0.2.1"]), 0);
    assert_eq!(pending.changes().len(), 1);
    cache.abort(pending);
    // It is unknown whether the change was written.
    assert_eq!(sweep(&mut cache, 1), [gone(1, 1, "192.0.2.1")]);
    assert_eq!(sweep(&mut cache, 2), []);
}

#[test]
fn learned_addresses_survive_a_restart() {
    let mut cache = cache(Config::default(), EVERYTHING);
    learn(&mut cache, 1, &answer("a\\.b.test", 60, &["192.0.2.1"]), 0);
    learn(&mut cache, 1, &answer("b.test", 10, &["192.0.2.2"]), 0);
    let mut lines: Vec<String> = cache
        .save(1000)
        .map(|saved| serde_json::to_string(&saved).unwrap())
        .collect();
    // This name was learned after the last save, so only the journal has it.
    let pending = cache.learn(1, &answer("c.test", 60, &["192.0.2.3", "192.0.2.4"]), 1000);
    lines.extend(
        cache
            .journal(&pending, 1000)
            .iter()
            .map(|saved| serde_json::to_string(saved).unwrap()),
    );
    release(&mut cache, pending);

    // The clock after the restart is another one; 40 s have passed.
    let mut cache = Cache::new(Config::default());
    for line in &lines {
        let saved: SavedName = serde_json::from_str(line).unwrap();
        assert_eq!(cache.restore(&saved, 40_000, 7).unwrap().changes(), []);
    }
    let update = cache.set_selectors(1, selectors(EVERYTHING));
    assert_eq!(
        done(&mut cache, update),
        [
            live(1, 1, "192.0.2.1"),
            live(1, 1, "192.0.2.2"),
            live(1, 1, "192.0.2.3"),
            live(1, 1, "192.0.2.4"),
        ]
    );
    let left: Vec<_> = cache
        .list(None, 7)
        .into_iter()
        .flat_map(|name| {
            name.addresses
                .into_iter()
                .map(move |a| (name.name.clone(), a.left))
        })
        .collect();
    assert_eq!(
        left,
        [
            ("a\\.b.test".to_owned(), Some(19_000)),
            ("b.test".to_owned(), None),
            ("c.test".to_owned(), Some(20_000)),
            ("c.test".to_owned(), Some(20_000)),
        ]
    );
    let bad = SavedName {
        endpoint: 1,
        name: "a..b".into(),
        addresses: vec![],
    };
    assert!(cache.restore(&bad, 0, 7).is_err());
}

#[test]
fn wildcards_over_thousands_of_hosts() {
    let mut cache = cache(Config::default(), &[(1, "*.hosts.test"), (2, "**.test")]);
    for host in 0..5000_u32 {
        let address = IpAddr::from((0x0a00_0000 + host % 100).to_be_bytes());
        let a = answer(&format!("h{host}.hosts.test"), 60, &[&address.to_string()]);
        let expected = if host < 100 { 2 } else { 0 };
        assert_eq!(learn(&mut cache, 1, &a, 0).len(), expected);
    }
    let memory = cache.memory();
    assert_eq!(
        (memory.names, memory.addresses, memory.triples),
        (5000, 5000, 200)
    );
    assert!(memory.bytes / memory.addresses < 320, "{memory:?}");
    assert_eq!(sweep(&mut cache, 60_000), []);
    assert_eq!(sweep(&mut cache, 60_001).len(), 200);
    assert_eq!(cache.memory().triples, 0);
}

/// Learns `count` addresses, each of a name of its own. Returns the number of refused addresses.
fn fill(cache: &mut Cache, endpoint: EndpointId, count: u32, now: Millis) -> usize {
    let mut refused = 0;
    for n in 0..count {
        let address = std::net::Ipv4Addr::from_bits(0x0b00_0000 | u32::from(endpoint) << 16 | n).to_string();
        let name = format!("n{n}.test");
        let pending = cache.learn(endpoint, &answer(&name, 60, &[&address]), now);
        refused += pending.refused();
        release(cache, pending);
    }
    refused
}

fn held(cache: &Cache, endpoint: EndpointId) -> Vec<IpAddr> {
    let names = cache.list(Some(endpoint), 0);
    names
        .iter()
        .flat_map(|name| name.addresses.iter().map(|address| address.ip))
        .collect()
}

#[test]
fn the_largest_endpoint_loses_addresses_to_the_others() {
    let config = Config {
        addresses_total: 3000,
        ..Config::default()
    };
    let mut cache = cache(config, EVERYTHING);
    for endpoint in [2, 3, 4] {
        let update = cache.set_selectors(endpoint, selectors(EVERYTHING));
        cache.written(update);
    }
    for endpoint in [1, 2, 3] {
        fill(&mut cache, endpoint, 2000, 0);
    }
    assert!(cache.memory().addresses <= 3000);
    // The fourth endpoint gets an equal share, taken from the endpoints with the most addresses.
    assert_eq!(fill(&mut cache, 4, 750, 1), 0);
    assert_eq!(held(&cache, 4).len(), 750);
    assert!(cache.memory().addresses <= 3000);
    for endpoint in [1, 2, 3] {
        let held = held(&cache, endpoint).len();
        assert!(held >= 650, "{endpoint}: {held}");
    }
    // Answers with known addresses evict nothing.
    let before = cache.stats().evicted;
    assert_eq!(fill(&mut cache, 4, 750, 2), 0);
    assert_eq!(cache.stats().evicted, before);
}

#[test]
fn only_an_endpoint_above_its_share_loses_addresses_in_use() {
    let config = Config {
        addresses_total: 1000,
        ..Config::default()
    };
    let mut cache = cache(config, EVERYTHING);
    let update = cache.set_selectors(2, selectors(EVERYTHING));
    cache.written(update);
    fill(&mut cache, 1, 1000, 0);
    let all = held(&cache, 1);
    cache.mark_in_use(1, all);
    assert_eq!(fill(&mut cache, 2, 400, 1), 0);
    assert_eq!(held(&cache, 2).len(), 400);
    let all = held(&cache, 2);
    cache.mark_in_use(2, all);
    // Endpoint 1 still has more than half, so its answers do not evict addresses of endpoint 2.
    fill(&mut cache, 1, 2000, 2);
    assert_eq!(held(&cache, 2).len(), 400);
    assert!(cache.memory().addresses <= 1000);
}

#[test]
fn special_purpose_addresses_are_learned_only_if_listed() {
    let config = Config {
        special: Special::Refuse(vec!["10.20.0.0/16".parse().unwrap()]),
        ..Config::default()
    };
    let mut cache = cache(config, &[(1, "*.test"), (2, "bad.test")]);
    let special = [
        "127.0.0.1",
        "169.254.169.254",
        "255.255.255.255",
        "224.0.0.1",
        "192.168.1.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
    ];
    assert_eq!(learn(&mut cache, 1, &answer("a.test", 60, &special), 0), []);
    assert_eq!(cache.stats().special, special.len() as u64);
    // The other addresses of an answer are learned.
    let mixed = answer("a.test", 60, &["8.8.8.8", "10.20.0.1", "10.21.0.1"]);
    assert_eq!(
        learn(&mut cache, 1, &mixed, 0),
        [live(1, 1, "10.20.0.1"), live(1, 1, "8.8.8.8")]
    );
    // A rule of the endpoint lists one address. A denied name is learned with all its addresses.
    let listed = ListedPrefixes {
        prefixes: vec!["192.168.1.0/24".parse().unwrap(), "0.0.0.0/0".parse().unwrap()],
        denied: vec![SelectorId(2)],
    };
    let update = cache.set_listed(1, Arc::new(listed));
    assert_eq!(done(&mut cache, update), []);
    assert_eq!(
        learn(&mut cache, 1, &answer("a.test", 60, &special), 0),
        [live(1, 1, "192.168.1.1")]
    );
    assert_eq!(
        learn(&mut cache, 1, &answer("bad.test", 60, &["127.0.0.1"]), 0),
        [live(1, 1, "127.0.0.1"), live(1, 2, "127.0.0.1")]
    );
    // Addresses that are no longer listed are removed.
    let update = cache.set_listed(1, Arc::default());
    assert_eq!(
        done(&mut cache, update),
        [
            gone(1, 1, "127.0.0.1"),
            gone(1, 1, "192.168.1.1"),
            gone(1, 2, "127.0.0.1")
        ]
    );
}
