//! Filters for flow records, with the flags of Hubble's command line.
//!
//! A [`FlowFilter`] has the fields of the flow API's message of that name; two fields about source and destination are
//! one field with sides here. A field matches if one of its values matches, and a filter matches if every field that is
//! set matches. A flow passes [`Filters`] if its time is in their range, no filter of the blacklist matches, and a
//! filter of the whitelist matches or the whitelist is empty.
//!
//! [`FilterBuilder`] makes filters from flags. The order of the flags matters, since `--not` reverses the flag after
//! it. This crate does not parse the command line: [`FLAGS`] lists every flag with its help, the binary derives its
//! arguments from that list (each repeatable) and passes name and value of each argument in the order of the command
//! line.
//!
//! A flag without a side, `--ip 10.0.1.10`, accepts either side. Several flags without a side are independent:
//! `--ip 10.0.1.10 --port 80` means "10.0.1.10 is at one end, and port 80 is at one end".

mod flags;
mod matches;
mod model;
mod parse;

pub use flags::{FLAGS, Flag};
pub use model::{Filters, FlowFilter, LabelSelector};
pub use parse::{FilterBuilder, FilterError, ValueError};
