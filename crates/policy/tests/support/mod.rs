//! What the property tests share: random worlds and policies, an evaluator that works from the rules, a model of
//! the BPF maps.

pub mod maps;
pub mod naive;
pub mod random;
