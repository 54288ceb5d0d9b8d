//! DNS rule sets: which rule of a set decides.

use std::{collections::BTreeMap, sync::Arc};

use palisade_inspect::Rules;

use crate::common::{pattern, rule_set};

#[test]
fn the_first_alternative_that_matches_decides() {
    let sets = BTreeMap::from([
        (
            1,
            rule_set(&[(10, "a.test"), (11, "*.test"), (12, ""), (13, "b.test")]),
        ),
        (2, rule_set(&[(20, "*.test"), (21, "a.test")])),
        (3, rule_set(&[])),
    ]);
    let rules = Rules::prepare(&sets, None);
    let evaluate = |set: u32, name: &str| rules.dns(set).unwrap().evaluate(&name.parse().unwrap());
    assert_eq!(evaluate(1, "a.test"), Some(10));
    assert_eq!(evaluate(1, "b.test"), Some(11));
    assert_eq!(evaluate(1, "x.y"), Some(12));
    assert_eq!(evaluate(2, "a.test"), Some(20));
    assert_eq!(evaluate(2, "x.y"), None);
    assert_eq!(evaluate(3, "a.test"), None);
    assert!(rules.dns(4).is_none() && !rules.knows(4) && rules.knows(3));
}

#[test]
fn an_unchanged_rule_set_is_not_prepared_again() {
    let mut sets = BTreeMap::from([(1, rule_set(&[(10, "a.test")])), (2, rule_set(&[(20, "b.test")]))]);
    let before = Rules::prepare(&sets, None);
    sets.insert(1, rule_set(&[(10, "a.test")]));
    sets.insert(2, rule_set(&[(20, "c.test")]));
    let after = Rules::prepare(&sets, Some(&before));
    let same = |set| std::ptr::eq(before.dns(set).unwrap(), after.dns(set).unwrap());
    assert!(same(1) && !same(2));
    assert_eq!(
        after.dns(2).unwrap().evaluate(&"c.test".parse().unwrap()),
        Some(20)
    );
    sets.remove(&1);
    assert!(!Rules::prepare(&sets, Some(&after)).knows(1));
}

#[test]
fn an_invalid_pattern_matches_nothing_and_is_reported() {
    let sets = BTreeMap::from([(1, rule_set(&[(10, "a..*"), (11, "b.test"), (12, "..")]))]);
    let rules = Rules::prepare(&sets, None);
    assert_eq!(rules.problems().len(), 2);
    assert!(rules.problems().iter().all(|problem| problem.ruleset == 1));
    let dns = rules.dns(1).unwrap();
    assert_eq!(dns.evaluate(&"b.test".parse().unwrap()), Some(11));
    assert_eq!(dns.evaluate(&"a.test".parse().unwrap()), None);
    assert!(Arc::ptr_eq(rules.source(1).unwrap(), &sets[&1]));
    assert!(matches!(pattern("a"), palisade_model::rule::FqdnPattern::Name(_)));
}
