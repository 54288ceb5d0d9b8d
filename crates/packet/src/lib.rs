//! The packet decoder.
#![no_std]
#![forbid(unsafe_code)]
