//! The operations of a plan. Each operation writes to one BPF map.

use palisade_abi::{
    Addr, Class, EndpointState, Identity, IpcacheEntry, LearnedKey, PolicyEntry, PolicyKey, PrefixKey,
};

/// One operation. The datapath carries out the operations of a plan in their order. Each element of an operation is
/// written atomically, and the elements can be written in any order.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Adds or replaces entries of the policy table.
    PolicyPut(Vec<(PolicyKey, PolicyEntry)>),
    /// Removes entries of the policy table. A missing entry is not an error.
    PolicyDelete(Vec<PolicyKey>),
    /// Stores the port class of each listed slot ([`palisade_abi::class_slot`]).
    ClassPut(Vec<(u32, Class)>),
    /// Adds or replaces a full-length address.
    AddressPut(Addr, IpcacheEntry),
    /// Removes a full-length address.
    AddressDelete(Addr),
    /// Adds or replaces a prefix of the trie.
    PrefixPut(PrefixKey, IpcacheEntry),
    /// Removes a prefix of the trie.
    PrefixDelete(PrefixKey),
    /// Adds or replaces an address that an endpoint has learned.
    LearnedPut(LearnedKey, Identity),
    /// Removes an address that an endpoint has learned.
    LearnedDelete(LearnedKey),
    /// Stores the state of an endpoint. A state of zeros removes the endpoint: all its packets are dropped.
    EndpointPut(u16, EndpointState),
}
