//! The section of a spec that is being parsed.

use super::selector::Scope;

/// Direction of a section.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

/// The section that a rule is in.
#[derive(Clone, Copy)]
pub(super) struct Section<'a> {
    pub direction: Direction,
    pub deny: bool,
    pub scope: Scope<'a>,
}
