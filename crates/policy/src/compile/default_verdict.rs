//! The verdict of a direction on packets that no rule matches.

use std::sync::Arc;

use palisade_abi::Direction;
use palisade_model::{
    inventory::Enforcement,
    snapshot::{RuleInfo, RuleKey},
};

use super::{
    compiler::Compiler, numbers::plain, spec::SpecKey, subject::AppliedSpec, table_rule::DefaultVerdict,
};

impl Compiler {
    /// Returns the verdict of a subject and direction on packets that no rule matches.
    pub(super) fn default_verdict(&mut self, at: usize, direction: Direction) -> DefaultVerdict {
        let number = direction as u8;
        let subject = &self.subjects[at];
        let mut any_rules: Option<&SpecKey> = None;
        let mut denying: Vec<(&SpecKey, bool)> = Vec::new();
        for (key, AppliedSpec { unit, .. }) in subject.applied_specs() {
            let Some(denies) = unit.denies[direction as usize] else {
                continue;
            };
            any_rules.get_or_insert(key);
            if denies {
                denying.push((key, unit.audit));
            }
        }
        let enforcement = self.inventory.options.enforcement;
        let init = subject.labels.has_reserved("init");
        let not_enforced = enforcement == Enforcement::Never
            || (enforcement == Enforcement::Default && !init && any_rules.is_none());
        let strict = enforcement == Enforcement::Always || init;
        let audit = !strict && denying.iter().all(|(_, audit)| *audit);
        // The rule of a default deny names enforced policies. It names policies in audit mode only if all denying
        // policies are in audit mode.
        denying.retain(|(_, in_audit)| audit || !*in_audit);
        let mut policies: Vec<&SpecKey> = denying.into_iter().map(|(key, _)| key).collect();
        policies.dedup_by(|a, b| (&a.policy, a.kind, &a.file) == (&b.policy, b.kind, &b.file));

        let mut location = None;
        let mut file = Arc::<str>::from("");
        let (allow, key) = if not_enforced {
            (true, RuleKey::NotEnforced { direction: number })
        } else if let Some(first) = policies.first() {
            location = self.specs.get(*first).map(|unit| unit.policy().location.clone());
            file = Arc::clone(&first.file);
            let key = RuleKey::DefaultDeny {
                direction: number,
                policy: Arc::clone(&first.policy),
                others: (policies.len() - 1) as u32,
            };
            (false, key)
        } else if init {
            (false, RuleKey::InitEndpoint { direction: number })
        } else if enforcement == Enforcement::Always {
            (false, RuleKey::AlwaysEnforced { direction: number })
        } else {
            let first = any_rules.map_or_else(|| Arc::from(""), |key| Arc::clone(&key.policy));
            location = any_rules
                .and_then(|key| self.specs.get(key))
                .map(|unit| unit.policy().location.clone());
            file = any_rules.map_or_else(|| Arc::from(""), |key| Arc::clone(&key.file));
            let key = RuleKey::DefaultAllow {
                direction: number,
                policy: first,
            };
            (true, key)
        };
        let rule = self.rule_ids.number(
            &file,
            RuleInfo {
                location,
                ..plain(key)
            },
        );
        DefaultVerdict {
            allow,
            unenforced: not_enforced,
            rule,
            audit: !allow && audit,
        }
    }
}
