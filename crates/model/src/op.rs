//! The operations of a plan: each is one write to the BPF maps.

use palisade_abi::{
    Addr, Class, EndpointState, Identity, IpcacheEntry, LearnedKey, PolicyEntry, PolicyKey, PrefixKey,
};

/// One step. The data path carries them out in their order; within a step each element is atomic by itself,
/// and the elements may be written in any order.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Add or replace entries of the policy table.
    PolicyPut(Vec<(PolicyKey, PolicyEntry)>),
    /// Remove entries of the policy table. One that is not there is not an error.
    PolicyDelete(Vec<PolicyKey>),
    /// Store the class of slots ([`palisade_abi::class_slot`]).
    ClassPut(Vec<(u32, Class)>),
    /// Add or replace a full-length address.
    AddressPut(Addr, IpcacheEntry),
    /// Remove a full-length address.
    AddressDelete(Addr),
    /// Add or replace a prefix of the trie.
    PrefixPut(PrefixKey, IpcacheEntry),
    /// Remove a prefix of the trie.
    PrefixDelete(PrefixKey),
    /// Add or replace an address that an endpoint has learned.
    LearnedPut(LearnedKey, Identity),
    /// Remove an address that an endpoint had learned.
    LearnedDelete(LearnedKey),
    /// Store the state of an endpoint. All zero: the endpoint is gone (everything of it is dropped).
    EndpointPut(u16, EndpointState),
}
