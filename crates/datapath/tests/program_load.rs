//! The programs load, and every map and program of the contract is in the object.

use aya::programs::{SchedClassifier, Xdp};
use palisade_abi::programs;

#[test]
fn loads() {
    let mut ebpf = aya::EbpfLoader::new().load(palisade_datapath::OBJECT).unwrap();
    for name in [programs::TC_INGRESS, programs::TC_EGRESS] {
        let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        println!(
            "{name}: {:?}",
            program.info().unwrap().verified_instruction_count()
        );
    }
    let program: &mut Xdp = ebpf
        .program_mut(programs::XDP_INGRESS)
        .unwrap()
        .try_into()
        .unwrap();
    program.load().unwrap();
    println!("xdp: {:?}", program.info().unwrap().verified_instruction_count());
    for (name, map) in ebpf.maps() {
        println!("{name}: {map:?}");
    }
}
