//! Cost of a packet of an established flow, compared with a program that only decodes and looks up. Measure on an idle
//! machine: `cargo test -p palisade-datapath --test program_cost -- --ignored --nocapture`.

mod program;

use palisade_abi::{CtEntry, Decision, Direction, identity};
use program::packets::*;
use program::*;

/// Median time of one run, ns.
fn median(mut times: Vec<u32>) -> u32 {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
#[ignore = "measures"]
fn an_established_flow_against_the_baseline() {
    for (client, server) in [(WORLD_V4, HOST_V4), (WORLD_V6, HOST_V6)] {
        let mut world = World::of(palisade_datapath::BENCH_OBJECT, NIC, HOST, 1024);
        world.rule(
            HOST,
            Direction::Ingress,
            identity::ANY,
            5,
            entry(Decision::Allow, 7),
        );
        let frame = tcp((client, 4000), (server, 80), ACK);
        assert!(world.run(Hook::Xdp, &frame).passed);
        // Answered and acknowledged, so the flow is protected.
        assert!(world.run_local(&tcp((server, 80), (client, 4000), ACK)).passed);
        assert!(world.run(Hook::Xdp, &frame).passed);
        let baseline = world.program_named("bench_baseline");
        let real = world.program(Hook::Xdp);
        let tc = world.program(Hook::TcIn);
        assert_eq!(sys::test_run(baseline, &frame, &[], 1).unwrap().0, 2);
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..7 {
            for (program, times) in [baseline, real, tc].into_iter().zip(&mut times) {
                times.push(sys::test_run(program, &frame, &[], 100_000).unwrap().1);
            }
        }
        let [baseline, real, tc] = times.map(median);
        println!(
            "{client}: baseline {baseline} ns, XDP {real} ns ({:.2}), tc {tc} ns",
            f64::from(real) / f64::from(baseline)
        );
        let flow: CtEntry = world.flow(&key(HOST, 6, (server, 80), (client, 4000))).unwrap();
        assert!(flow.forward_packets > 500_000 && flow.protected == 1);
    }
}
