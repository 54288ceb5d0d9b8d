//! Parser of the `spec` of a CiliumNetworkPolicy or CiliumClusterwideNetworkPolicy, and of a bare rule in a case file
//! of `policy test`.

use palisade_model::rule::{PolicyKind, Rule, Spec, Subject};

use super::{
    reader::{At, Object},
    rules,
    section::{Direction, Section},
    selector::{self, Keys, Scope},
};

/// Parses a spec of a policy of this kind and namespace.
pub(super) fn read(at: At<'_>, kind: PolicyKind, namespace: Option<&str>) -> Option<Spec> {
    let object = at.object()?;
    let mut scope = Scope {
        kind,
        namespace,
        selects_init: false,
    };
    let subject = subject(&object, scope);
    if let Some(Subject::Endpoints(selector)) = &subject {
        scope.selects_init = selector::names_init(selector);
    }

    let section = |name, direction, deny| {
        rules_of(
            &object,
            name,
            Section {
                direction,
                deny,
                scope,
            },
        )
    };
    let ingress = section("ingress", Direction::Ingress, false);
    let ingress_deny = section("ingressDeny", Direction::Ingress, true);
    let egress = section("egress", Direction::Egress, false);
    let egress_deny = section("egressDeny", Direction::Egress, true);

    let (mut default_deny_ingress, mut default_deny_egress) = (None, None);
    if let Some(switch) = object.field("enableDefaultDeny").and_then(|at| at.object()) {
        default_deny_ingress = switch.field("ingress").and_then(|at| at.boolean());
        default_deny_egress = switch.field("egress").and_then(|at| at.boolean());
        switch.finish();
    }
    let description = object
        .field("description")
        .and_then(|at| at.string())
        .unwrap_or_default()
        .to_owned();
    // Neither field influences verdicts: labels group rules, and log is for flow logs.
    object.ignore(&["labels", "log"]);
    object.warn_null(&["ingress", "ingressDeny", "egress", "egressDeny"]);
    let all_known = object.finish();

    let sections = ["ingress", "ingressDeny", "egress", "egressDeny"];
    let says_nothing = |name| object.field(name).is_none_or(|at| at.is_empty_list());
    // If there is an unknown field, this error is not reported, because the field could be a misspelled section.
    if all_known && sections.into_iter().all(says_nothing) {
        at.error(
            "one of ingress, ingressDeny, egress and egressDeny must hold a rule; \
             to deny everything of a direction write the empty rule, as in ingress: [{}]",
        );
    }
    Some(Spec {
        subject: subject?,
        ingress,
        ingress_deny,
        egress,
        egress_deny,
        default_deny_ingress,
        default_deny_egress,
        description,
        location: at.location(),
    })
}

fn subject(object: &Object<'_>, scope: Scope<'_>) -> Option<Subject> {
    // In a bare rule, a null selector selects every endpoint.
    let selector = |name| {
        if object.at.is_bare() {
            object.field_or_null(name)
        } else {
            object.field(name)
        }
    };
    let endpoints = selector("endpointSelector");
    let node = selector("nodeSelector");
    match (endpoints, node) {
        (Some(_), Some(at)) => {
            at.error(
                "endpointSelector and nodeSelector cannot be combined in one spec; write a spec for each (specs)",
            );
            None
        }
        (Some(at), None) => scope.subject(at, Keys::Sourced).map(Subject::Endpoints),
        (None, Some(at)) => {
            if scope.kind == PolicyKind::Cnp {
                at.error("nodeSelector is for a CiliumClusterwideNetworkPolicy: nodes have no namespace");
            }
            selector::read(at, Keys::Sourced).map(Subject::Node)
        }
        (None, None) => {
            object
                .at
                .error("one of endpointSelector and nodeSelector is needed; {} selects every endpoint");
            None
        }
    }
}

/// Parses a section. An empty section is the same as none.
fn rules_of(object: &Object<'_>, name: &'static str, section: Section<'_>) -> Option<Vec<Rule>> {
    let list = object.field(name)?.list()?;
    if list.is_empty() {
        return None;
    }
    Some(list.read(|at| rules::read(at, section)))
}
