//! Offload windows that are put off: their number, and senders that contradict themselves while windows are open or put
//! off.

use super::{super::table::MOST_UNSETTLED, *};

const MSS: u32 = 1_448;
/// Window scale with which a receiver offers less than a long message, so that its sender is limited.
const SCALE: u8 = 4;
/// Length of the body of a long message.
const BODY: u32 = 1 << 20;
/// Length of a long message with its head.
const LONG: u32 = 6 + BODY;

/// Returns the beginning of a long message: its head, and as much of its body as a segment holds.
fn head() -> Vec<u8> {
    let [_, a, b, c] = BODY.to_be_bytes();
    let mut bytes = vec![5, b'B', a, b, c, 0];
    bytes.resize(MSS as usize, 0);
    bytes
}

fn limits() -> TcpLimits {
    TcpLimits {
        window: 64 << 10,
        limits_senders: true,
        ..TcpLimits::default()
    }
}

/// Opens the connection of a client, and sends a long message and the head of another one, whose window is put off because
/// the sender may send more.
fn put_off(bench: &mut Bench, peer: u32) {
    let [_, x, y, z] = peer.to_be_bytes();
    let of = |seg: Seg| Seg {
        peer: [x, y, z],
        ..seg
    };
    let [high, low] = (MSS as u16).to_be_bytes();
    let syn = |side, flags, seq, ack| Seg {
        options: vec![2, 4, high, low, 3, 3, SCALE, 1],
        ..Seg::new(side, flags, seq, ack, b"")
    };
    let open = CLIENT_ISN.wrapping_add(1);
    for seg in [
        syn(Side::Client, SYN, CLIENT_ISN, 0),
        syn(Side::Server, SYN | ACK, SERVER_ISN, open),
        client(0, b""),
        server(0),
        client(0, &head()),
        // The rest of the message is in the offload window.
        server(LONG),
        client(LONG, &head()),
    ] {
        bench.put(&of(seg));
    }
}

fn windows(out: &Out) -> usize {
    let commands = out.commands.iter().chain(&out.bare_commands);
    commands
        .filter(|command| command.op == flow_op::LIMITED_WINDOWS)
        .count()
}

#[test]
fn a_worker_that_never_settles_puts_off_a_bounded_number_of_windows() {
    let mut bench = Bench::new(limits());
    for peer in 0..MOST_UNSETTLED as u32 {
        put_off(&mut bench, peer);
        assert_eq!(windows(&bench.take()), 1, "only that of the first message");
    }
    assert_eq!(bench.table.unsettled(), MOST_UNSETTLED);
    // The next packet of any connection sets all of them.
    bench.put(&Seg {
        peer: [9, 9, 9],
        ..syn_of(0)
    });
    assert_eq!(windows(&bench.take()), MOST_UNSETTLED);
    assert_eq!(bench.table.unsettled(), 0);
    put_off(&mut bench, 1 << 20);
    assert_eq!(bench.table.unsettled(), 1);
    bench.take();
    bench.settle();
    assert_eq!(windows(&bench.take()), 1);
}

#[test]
fn keys_of_removed_connections_do_not_collect() {
    let mut bench = Bench::new(limits());
    for round in 0..3 * MOST_UNSETTLED {
        put_off(&mut bench, 1);
        assert!(bench.table.unsettled() <= MOST_UNSETTLED, "{round}");
        bench.forget();
    }
    assert_eq!(bench.table.stats().connections, 0);
    put_off(&mut bench, 1);
    bench.take();
    bench.settle();
    assert_eq!(windows(&bench.take()), 1, "that of the connection that is left");
    assert_eq!(bench.table.unsettled(), 0);
}
