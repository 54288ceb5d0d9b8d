//! Flow records, made from the events of the BPF programs and the records of the inspectors: a ring of recent records,
//! filters, text and JSON.
//!
//! The crate does no I/O and reads no clock. The daemon implements [`FlowResolver`], makes flows with
//! [`Flow::from_event`] and keeps them in a [`Ring`]. The ring stores records of inspectors, and makes their flows
//! ([`Flow::from_record`]) only when a reader needs them. A reader uses a [`Cursor`], [`Filters`] (made from flags by
//! [`FilterBuilder`]) and a [`format::Format`].
//!
//! Depends on `palisade-abi` (events) and `palisade-inspect` (records). Start at [`Flow`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

mod drop_reason;
pub mod duration;
mod field_mask;
pub mod filter;
pub mod flow;
pub mod format;
pub mod input;
mod order;
mod record;
mod resolve;
mod ring;
mod time;
mod uuid;

pub use drop_reason::DropReason;
pub use field_mask::FieldMask;
pub use filter::{FilterBuilder, FilterError, Filters, FlowFilter};
pub use flow::{Flow, Policy, TrafficDirection};
pub use order::Ordered;
pub use resolve::{FlowResolver, Owner, RuleInfo, icmp_text};
pub use ring::{Cursor, Item, Lost, LostSource, Next, Raw, Resolver, Ring};
pub use time::{ParseTimeError, TimeFormat, Timestamp};
pub use uuid::Uuid;
