//! What the verifier makes of the programs.

mod program;

use palisade_abi::programs;
use program::{NIC, World};

/// What a program may cost the verifier, of the 1,000,000 instructions it walks at the most. Far above what they do
/// cost (docs/ARCHITECTURE.md, "Verifier"), and far below what takes a second to load.
const BOUND: u32 = 100_000;

#[test]
fn the_verifier_walks_few_instructions() {
    let verified = World::new(NIC, 1).verified();
    for name in [programs::XDP_INGRESS, programs::TC_INGRESS, programs::TC_EGRESS] {
        let count = verified
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, count)| *count);
        println!("{name}: {count:?} instructions verified");
        assert!(count.is_some_and(|count| count < BOUND), "{name}: {count:?}");
    }
}
