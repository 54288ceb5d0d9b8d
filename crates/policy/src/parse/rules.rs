//! The rules of a section: peers, ports, authentication.

use palisade_model::rule::{Peers, Ports, Rule};
use palisade_yaml::quoted;

use super::{
    peers,
    ports::{icmp_rule, port_rule},
    reader::{At, hint},
    section::Section,
};

/// Parses one rule of `ingress`, `ingressDeny`, `egress` or `egressDeny`.
pub(super) fn read(at: At<'_>, section: Section<'_>) -> Option<Rule> {
    let object = at.object()?;
    let peers = peers::read(&object, section);

    let to_ports = object.field("toPorts").and_then(|at| at.list());
    let icmps = object.field("icmps").and_then(|at| at.list());
    let given = |list: &Option<super::reader::List<'_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if given(&to_ports) && given(&icmps) {
        object.error_at_key(
            "icmps",
            "icmps and toPorts cannot be combined in one rule; write a rule for each",
        );
    }
    let mut port_rules = Vec::new();
    if let Some(list) = &to_ports {
        port_rules.extend(list.read(|at| port_rule(at, section)));
    }
    if let Some(list) = &icmps {
        port_rules.extend(list.read(icmp_rule));
    }
    let has_ports = given(&to_ports) || given(&icmps);
    let ports = if has_ports {
        Ports::OneOf(port_rules)
    } else {
        Ports::Any
    };

    let auth_required = if section.deny {
        object.refuse("authentication", "cannot be part of a rule that denies");
        false
    } else {
        object.field("authentication").is_some_and(authentication)
    };
    let requires = peers::requirements(&object, section);
    object.warn_null(&["toPorts", "icmps"]);
    object.finish();

    let peers = match peers {
        Some(peers) => peers,
        // A rule with ports but without peers selects every peer; an empty rule selects none.
        None if has_ports => Peers::Any,
        None => Peers::None,
    };
    Some(Rule {
        peers,
        ports,
        requires,
        auth_required,
        location: at.location(),
    })
}

/// Parses `authentication`. Returns whether the rule allows only authenticated peers.
fn authentication(at: At<'_>) -> bool {
    const MODES: [&str; 2] = ["disabled", "required"];
    let Some(object) = at.object() else {
        return false;
    };
    let mode = if at.is_bare() {
        object.text("mode")
    } else {
        object.required_text("mode")
    };
    object.finish();
    match mode {
        Some("disabled") | None => false,
        // Authentication with mode `test-always-fail` always fails, and so does `required` as long as Palisade cannot
        // authenticate peers.
        Some("required" | "test-always-fail") => {
            at.warning("authentication is not implemented; this traffic is dropped (reason 189)");
            true
        }
        Some(other) => {
            let message = format!("unknown mode {}{}", quoted(other), hint(other, &MODES));
            if at.is_bare() {
                at.warning(message);
            } else {
                object.error_at_key("mode", message);
            }
            false
        }
    }
}
