//! Loads and attaches the BPF programs and owns every map.

mod object;

pub use object::OBJECT;
