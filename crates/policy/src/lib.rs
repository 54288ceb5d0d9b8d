//! Policies from YAML to the policy tables that the BPF programs look up.
//!
//! ```text
//! YAML ── parse ──> rule::Policy ── compile ──> Snapshot ── plan ──> Op… ── datapath ──> BPF maps
//!         (FILE:LINE:COL errors)    (selectors, identities, (in an order in which each packet
//!                                    precedence)             meets the old or the new rules)
//! ```
//!
//! The crate does no I/O, and uses neither BPF maps nor a clock. `palisade policy test` and the daemon use the same
//! compiler.
//!
//! The crate depends on `palisade-model`, which holds the input and output types of the compiler, and on
//! `palisade-protocols` for the paths and regular expressions of HTTP rules. Start at [`compile::Compiler`]: its input
//! is the [`rule`](palisade_model::rule) types that [`parse`] returns, its output is a
//! [`Snapshot`](palisade_model::snapshot::Snapshot). [`plan::plan`] returns the map operations from one snapshot to the
//! next.
//!
//! ```
//! use palisade_abi::{Decision, Direction};
//! use palisade_model::inventory::{Endpoint, Inventory};
//! use palisade_model::labels::{Labels, parse_label};
//! use palisade_policy::compile::{Changes, Compiler, CompilerState, FileContent};
//! use palisade_policy::parse::parse;
//!
//! let text = "
//! apiVersion: cilium.io/v2
//! kind: CiliumNetworkPolicy
//! metadata: {name: web}
//! spec:
//!   endpointSelector: {matchLabels: {app: web}}
//!   ingress:
//!   - toPorts: [{ports: [{port: \"80\", protocol: TCP}]}]
//! ";
//! let parsed = parse("web.yaml", text);
//! assert!(!parsed.has_errors());
//! let file = FileContent { policies: parsed.policies, cidr_groups: parsed.cidr_groups };
//! let web = Endpoint {
//!     id: 7,
//!     name: "web-1".into(),
//!     namespace: "default".into(),
//!     labels: Labels::new(["app=web", "io.kubernetes.pod.namespace=default"].map(parse_label)),
//!     named_ports: Default::default(),
//!     addresses: vec!["10.0.1.7".parse()?],
//!     audit: false,
//! };
//!
//! let mut compiler = Compiler::new(&CompilerState::default());
//! let snapshot = compiler
//!     .update(Changes {
//!         inventory: Some(Inventory { endpoints: vec![web], ..Inventory::default() }),
//!         files: [("web.yaml".to_owned(), Some(file))].into(),
//!     })
//!     .expect("the policies do not conflict");
//! let client = snapshot.identity_of("192.0.2.1".parse()?).identity;
//! let decision = |port| {
//!     let entry = snapshot.policy_entry(7, Direction::Ingress, client, palisade_abi::protocol::TCP, Some(port));
//!     entry.map(|entry| Decision::from_u8(entry.decision))
//! };
//! assert_eq!(decision(80), Some(Decision::Allow));
//! assert_eq!(decision(22), Some(Decision::Deny));
//! # Ok::<(), std::net::AddrParseError>(())
//! ```
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod cases;
pub mod classes;
pub mod compile;
pub mod cuts;
pub mod identity;
pub mod l7;
pub mod parse;
pub mod plan;
pub mod suggest;
pub mod trace;
