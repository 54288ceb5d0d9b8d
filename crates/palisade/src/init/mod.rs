//! The first configuration and policy of a node, from what is in use on it. Pure: facts are collected by
//! `command::init`. Start at [`generate()`].

mod facts;
mod generate;

pub(crate) use facts::{Listener, NodeFacts, Outgoing, Session, Transport};
pub(crate) use generate::{Generated, POLICY_FILE, generate};
