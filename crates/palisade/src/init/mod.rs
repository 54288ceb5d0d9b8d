//! The first configuration and policy of a node, from what is in use on it. Pure: facts are collected by
//! `command::init`. Start at [`generate()`].

mod facts;
mod generate;
mod nft;

pub(crate) use facts::{Engine, Listener, NodeFacts, Outgoing, Session, Transport};
pub(crate) use generate::{Generated, POLICY_FILE, generate};
pub(crate) use nft::accept_rules;
