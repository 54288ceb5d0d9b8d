//! The types that the policy compiler shares with everything that enforces a policy.
//!
//! [`rule`] holds a policy after parsing, [`inventory`] the endpoints and peers of the node, [`snapshot`] the output of
//! the compiler, and [`op`] the writes that carry a snapshot to the BPF maps. [`request`] describes one request of an
//! application protocol, for case files and `policy trace`.
//!
//! The crate depends on `palisade-abi`. It has neither a parser nor the compiler, so a protocol parser or the datapath
//! can be built and tested without them. `palisade-policy` reads, compiles and plans.
//!
//! ```
//! use palisade_model::labels::{Labels, parse_label};
//! use palisade_model::rule::{LabelSource, Requirement, Selector, Test};
//!
//! let labels = Labels::new(["k8s:app=web", "k8s:tier=front"].map(parse_label));
//! let selector = Selector {
//!     requirements: vec![Requirement {
//!         source: LabelSource::Any,
//!         key: "app".into(),
//!         test: Test::In(vec!["web".into()]),
//!     }],
//! };
//! assert!(selector.matches(&labels));
//! ```
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod diagnostic;
pub mod identity;
pub mod inventory;
pub mod labels;
pub mod learned_identities;
mod lookup;
pub mod op;
pub mod request;
pub mod rule;
pub mod secret_value;
pub mod snapshot;
