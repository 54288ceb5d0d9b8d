//! Filters for flow records, with the fields of the flow API and the flags of Hubble's command line.
//!
//! An [`ApiFilter`] is a filter in the form of the flow API; it comes from a client, from a file, or from flags. It is
//! compiled to a [`FlowFilter`], which checks every value. A field matches if one of its values matches, and a filter
//! matches if every field that is set matches. A flow passes [`Filters`] if its time is in their range, no filter of the
//! blacklist matches, and a filter of the whitelist matches or the whitelist is empty. A field that Palisade does not
//! support is an error.
//!
//! [`FilterBuilder`] makes filters from flags. The order of the flags matters, since `--not` reverses the flag after
//! it. This crate does not parse the command line: [`FLAGS`] lists every flag with its help, the binary derives its
//! arguments from that list (each repeatable) and passes name and value of each argument in the order of the command
//! line.
//!
//! As with Hubble, a flag without a side, `--ip 10.0.1.10`, accepts either side, and several of them must match at the
//! same end: `--ip 10.0.1.10 --port 80` means "10.0.1.10 and port 80 are the source, or 10.0.1.10 and port 80 are the
//! destination". All flags that follow `--not` together are one filter, which excludes the flows that match all of them.

mod api;
mod builder;
mod compile;
mod flags;
mod matches;
mod model;
mod parse;

pub use api::{
    ApiFilter, ApiFilters, EnumValue, EventTypeFilter, Experimental, InterfaceFilter, PalisadeFilter,
};
pub use builder::FilterBuilder;
pub use compile::FilterError;
pub use flags::{FLAGS, Flag};
pub use model::{Filters, FlowFilter, LabelSelector};
pub use parse::ValueError;
