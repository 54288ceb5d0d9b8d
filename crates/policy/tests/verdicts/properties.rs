//! Properties: the compiled table decides as the rules do, and during a plan every packet gets the old or the new
//! verdict.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use palisade_abi::{Decision, Direction, LearnedKey, PolicyEntry, entry_flags};
use palisade_model::{
    inventory::Inventory,
    learned_identities::LearnedSet,
    rule::{
        CidrRule, FqdnPattern, Location, Peer as RulePeer, Peers, Policy, PolicyKind, Ports, Rule, Selector,
        Spec, Subject,
    },
    snapshot::{RuleKey, Snapshot, inspector_name},
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent, LearnedUpdate},
    plan::plan,
};
use proptest::prelude::*;

use crate::{
    maps::Maps,
    naive::{AuditedVerdict, Naive, Verdict, name_fits},
    random::{ADDRESSES, Fact, Packet, Tape, fact, file, files, inventory, packets},
};

fn changes(inventory: Option<Inventory>, files: &BTreeMap<String, FileContent>) -> Changes {
    Changes {
        inventory,
        files: files
            .iter()
            .map(|(name, content)| (name.clone(), Some(content.clone())))
            .collect(),
    }
}

/// Returns the snapshot of a compiler after the endpoints have learned some facts, and the update.
fn with_learned(compiler: &mut Compiler, facts: &[Fact]) -> (Snapshot, LearnedUpdate) {
    let names = compiler.snapshot().names.clone();
    let lists = compiler.snapshot().fqdn.clone();
    let mut learned: BTreeMap<(u16, IpAddr), BTreeSet<u32>> = BTreeMap::new();
    for fact in facts {
        for (number, pattern) in lists.get(&fact.endpoint).into_iter().flat_map(|list| list.iter()) {
            let (FqdnPattern::Name(text) | FqdnPattern::Pattern(text)) = pattern;
            if name_fits(text, fact.name) {
                learned
                    .entry((fact.endpoint, fact.address))
                    .or_default()
                    .insert(*number);
            }
        }
    }
    let learned: BTreeMap<(u16, IpAddr), Vec<u32>> = learned
        .into_iter()
        .map(|(key, selectors)| (key, selectors.into_iter().collect()))
        .collect();
    let wanted: BTreeSet<LearnedSet> = learned
        .iter()
        .filter_map(|((_, address), selectors)| names.set(*address, selectors))
        .collect();
    let update = compiler.learned(&wanted).unwrap();
    assert_eq!(update.numbers.len(), wanted.len());
    let mut snapshot = compiler.snapshot().clone();
    snapshot.learned.entries = learned
        .iter()
        .map(|((endpoint, address), selectors)| {
            let key = LearnedKey {
                addr: (*address).into(),
                endpoint: (*endpoint).into(),
            };
            (key, snapshot.names.identity(*address, selectors).unwrap())
        })
        .collect();
    (snapshot, update)
}

fn table_verdict(snapshot: &Snapshot, packet: &Packet) -> Option<(AuditedVerdict, PolicyEntry)> {
    let key = LearnedKey {
        addr: packet.remote.into(),
        endpoint: packet.endpoint.into(),
    };
    let learned = snapshot.learned.entries.get(&key).copied();
    let other = learned
        .filter(|_| packet.direction == Direction::Egress)
        .unwrap_or_else(|| snapshot.identity_of(packet.remote).identity);
    let entry = snapshot.policy_entry(
        packet.endpoint,
        packet.direction,
        other,
        packet.protocol,
        packet.port,
    )?;
    let verdict = match Decision::from_u8(entry.decision) {
        Decision::Allow => Verdict::Allow,
        Decision::Deny => Verdict::Deny,
        Decision::DenyExplicit => Verdict::DenyExplicit,
        Decision::AuthRequired => Verdict::Auth,
        Decision::DenyQuic => Verdict::DenyQuic,
        Decision::Inspect => Verdict::Inspect(inspector_name(snapshot.rulesets[&entry.ruleset].reads)),
    };
    Some(((verdict, entry.flags & entry_flags::AUDIT != 0), entry))
}

/// Returns the part of an entry that a packet can observe.
fn noticed(entry: Option<PolicyEntry>) -> Option<(u8, u8, u8)> {
    entry.map(|entry| (entry.decision, entry.flags & entry_flags::AUDIT, entry.inspector))
}

/// Observations allowed during a plan: by the old rules, by the new rules.
type Allowed = [Option<(u8, u8, u8)>; 2];

/// Packets with their verdicts before and after, to compare all of them in between.
struct Watch {
    packets: Vec<(Packet, Allowed)>,
}

impl Watch {
    fn new(old: &Maps, new: &Snapshot) -> Self {
        Self {
            packets: packets()
                .into_iter()
                .filter(|packet| {
                    [1, 2, 9].contains(&packet.endpoint)
                        && [(6, Some(80)), (6, Some(443)), (17, Some(80)), (1, Some(8))]
                            .contains(&(packet.protocol, packet.port))
                })
                .map(|packet| {
                    let new = table_verdict(new, &packet).map(|(_, entry)| entry);
                    (packet, [noticed(old.entry(&packet)), noticed(new)])
                })
                .collect(),
        }
    }

    fn look(&self, maps: &Maps, step: usize) {
        let others: HashMap<IpAddr, u32> = ADDRESSES
            .iter()
            .filter_map(|text| text.parse::<IpAddr>().ok())
            .map(|address| (address, maps.identity(address.into())))
            .collect();
        for (packet, allowed) in &self.packets {
            let now = noticed(maps.entry_from(others[&packet.remote], packet));
            assert!(
                allowed.contains(&now),
                "step {step}: {packet:?} gets {now:?}, neither {:?} (old) nor {:?} (new)",
                allowed[0],
                allowed[1]
            );
        }
    }
}

fn carry_out(maps: &mut Maps, old: &Snapshot, new: &Snapshot) {
    let watch = Watch::new(maps, new);
    for (step, op) in plan(old, new).iter().enumerate() {
        maps.apply(op, |maps| watch.look(maps, step));
    }
    maps.assert_equal(new);
}

fn tape(length: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..length)
}

/// Fewer cases than the default, because each checks many packets; `PROPTEST_CASES` overrides the number.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(32),
        max_shrink_iters: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// An address outside of every named prefix is in `/0`, whatever that prefix excludes (also `/0` of one family). An
/// address with a prefix of its own is excluded with the prefix.
#[test]
fn excepting_every_prefix_excludes_only_addresses_with_a_prefix() {
    let location = Location::default();
    let rule = |cidr: &str, except: &[&str]| Rule {
        peers: Peers::OneOf(vec![RulePeer::Cidr(CidrRule {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|text| text.parse().unwrap()).collect(),
        })]),
        ports: Ports::Any,
        requires: Vec::new(),
        auth_required: false,
        location: location.clone(),
    };
    let spec = |deny: bool, rule: Rule| Spec {
        subject: Subject::Endpoints(Selector::default()),
        ingress: None,
        ingress_deny: None,
        egress: (!deny).then(|| vec![rule.clone()]),
        egress_deny: deny.then(|| vec![rule]),
        default_deny_ingress: None,
        default_deny_egress: Some(!deny),
        description: String::new(),
        location: location.clone(),
    };
    let (bare, known) = ("198.51.100.1", "10.1.2.3");
    for (dual_stack, cidr, except, address, allowed) in [
        (false, "0.0.0.0/0", "::/0", bare, true),
        (false, "0.0.0.0/0", "0.0.0.0/0", bare, true),
        (true, "0.0.0.0/0", "0.0.0.0/0", bare, true),
        (true, "::/0", "::/0", bare, false),
        (false, "0.0.0.0/0", "::/0", known, true),
        (false, "0.0.0.0/0", "0.0.0.0/0", known, false),
        (true, "0.0.0.0/0", "0.0.0.0/0", known, false),
    ] {
        let mut inventory = inventory(&mut Tape::new(&[]));
        inventory.options.dual_stack = dual_stack;
        let policy = Policy {
            kind: PolicyKind::Raw,
            name: "p".into(),
            namespace: None,
            audit: false,
            // The second policy only gives the address a prefix of its own.
            specs: vec![
                spec(false, rule(cidr, &[except])),
                spec(true, rule("10.1.0.0/16", &["10.1.2.3/32"])),
            ],
            location: location.clone(),
        };
        let content = FileContent {
            policies: vec![policy],
            cidr_groups: Vec::new(),
        };
        let files: BTreeMap<String, FileContent> = [("p.yaml".to_owned(), content)].into();
        let mut compiler = Compiler::new(&CompilerState::default());
        compiler.update(changes(Some(inventory.clone()), &files)).unwrap();
        let packet = Packet {
            endpoint: 1,
            direction: Direction::Egress,
            remote: address.parse().unwrap(),
            protocol: 6,
            port: Some(80),
        };
        let table = table_verdict(compiler.snapshot(), &packet).map(|(verdict, _)| verdict);
        let expected = if allowed { Verdict::Allow } else { Verdict::Deny };
        let case = format!("{cidr} except {except} for {address}, dual stack: {dual_stack}");
        assert_eq!(table, Some((expected, false)), "{case}");
        assert_eq!(
            Naive::new(&inventory, &files, &[]).evaluate(&packet),
            table,
            "{case}"
        );
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_table_decides_as_the_rules_do(bytes in tape(500)) {
        let mut tape = Tape::new(&bytes);
        let inventory = inventory(&mut tape);
        let files = files(&mut tape);
        let facts: Vec<Fact> = (0..tape.pick(9)).map(|_| fact(&mut tape)).collect();
        let mut compiler = Compiler::new(&CompilerState::default());
        if compiler.update(changes(Some(inventory.clone()), &files)).is_err() {
            // The rules conflict.
            return Ok(());
        }
        let (snapshot, _) = with_learned(&mut compiler, &facts);
        let snapshot = &snapshot;
        let naive = Naive::new(&inventory, &files, &facts);
        for packet in packets() {
            let table = table_verdict(snapshot, &packet);
            prop_assert_eq!(table.map(|(verdict, _)| verdict), naive.evaluate(&packet), "{:?}", packet);
            if let Some(((verdict, _), entry)) = table {
                let info = snapshot.rules.get(&entry.rule);
                prop_assert!(info.is_some(), "rule {} is not known", entry.rule);
                let names_denial = matches!(&info.unwrap().key, RuleKey::Rule(place) if place.section.denies());
                prop_assert_eq!(names_denial, verdict == Verdict::DenyExplicit);
            }
        }
    }

    #[test]
    fn every_packet_gets_the_old_or_the_new_verdict(bytes in tape(900), restart in any::<bool>()) {
        let mut tape = Tape::new(&bytes);
        let mut the_inventory = inventory(&mut tape);
        let mut the_files = files(&mut tape);
        let dual_stack = the_inventory.options.dual_stack;
        let mut compiler = Compiler::new(&CompilerState::default());
        if compiler.update(changes(Some(the_inventory.clone()), &the_files)).is_err() {
            return Ok(());
        }
        let mut facts: Vec<Fact> = (0..tape.pick(9)).map(|_| fact(&mut tape)).collect();
        let (snapshot, _) = with_learned(&mut compiler, &facts);
        let mut maps = Maps::empty(snapshot.world_ipv4, snapshot.world_ipv6);
        for op in plan(&maps.read_back(), &snapshot) {
            maps.apply(&op, |_| {});
        }
        maps.assert_equal(&snapshot);
        let mut old = snapshot;
        for _ in 0..3 {
            // DNS answers: the new identities get rows in the current tables, then each address is mapped.
            for _ in 0..tape.pick(3) {
                facts.push(fact(&mut tape));
                let before: Vec<_> = packets().iter().map(|packet| noticed(maps.entry(packet))).collect();
                let (new, update) = with_learned(&mut compiler, &facts);
                for op in &update.ops {
                    maps.apply(op, |_| {});
                }
                let same: Vec<_> = packets().iter().map(|packet| noticed(maps.entry(packet))).collect();
                prop_assert!(before == same, "new identities of learned addresses were noticed");
                maps.learned.clone_from(&new.learned.entries);
                maps.assert_equal(&new);
                old = new;
            }
            let mut change = Changes::default();
            let unchanged = (the_inventory.clone(), the_files.clone());
            if tape.pick(2) == 1 {
                the_inventory = inventory(&mut tape);
                // The identities of the world belong to the configuration of the programs, which a plan does not
                // change.
                the_inventory.options.dual_stack = dual_stack;
                change.inventory = Some(the_inventory.clone());
            }
            for _ in 0..tape.pick(3) {
                let name = format!("{}.yaml", tape.pick(5));
                if tape.pick(4) == 3 {
                    the_files.remove(&name);
                    change.files.insert(name, None);
                } else {
                    let content = file(&mut tape, &name);
                    the_files.insert(name.clone(), content.clone());
                    change.files.insert(name, Some(content));
                }
            }
            if restart {
                let state = serde_json::to_string(&compiler.state()).unwrap();
                compiler = Compiler::new(&serde_json::from_str(&state).unwrap());
                old = maps.read_back();
                compiler.avoid(&old);
                change = changes(Some(the_inventory.clone()), &the_files);
            }
            if compiler.update(change).is_err() {
                // The refused change has no effect on the next one.
                if restart {
                    return Ok(());
                }
                let mut same = compiler.snapshot().clone();
                same.learned = old.learned.clone();
                prop_assert!(plan(&old, &same).is_empty());
                (the_inventory, the_files) = unchanged;
                continue;
            }
            let (new, _) = with_learned(&mut compiler, &facts);
            let before: Vec<_> = packets().iter().map(|packet| (*packet, noticed(maps.entry(packet)))).collect();
            let revisions: Vec<_> = (0..10).map(|id| maps.endpoint(id).map(|state| state.revision)).collect();
            carry_out(&mut maps, &old, &new);
            // Flows of endpoints whose verdicts have changed are evaluated again.
            for (packet, verdict) in before {
                let state = maps.endpoint(packet.endpoint);
                if verdict.is_some() && verdict != noticed(maps.entry(&packet)) && let Some(state) = state {
                    prop_assert_ne!(Some(state.revision), revisions[usize::from(packet.endpoint)]);
                }
            }
            // Compiling step by step equals compiling at once.
            let mut at_once = Compiler::new(&CompilerState::default());
            prop_assert!(at_once.update(changes(Some(the_inventory.clone()), &the_files)).is_ok());
            let (at_once, _) = with_learned(&mut at_once, &facts);
            for packet in packets() {
                prop_assert_eq!(
                    table_verdict(&new, &packet).map(|(verdict, _)| verdict),
                    table_verdict(&at_once, &packet).map(|(verdict, _)| verdict),
                    "{:?}", packet
                );
            }
            old = new;
        }
    }
}
