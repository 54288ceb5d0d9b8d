//! Sockets at both ends of a veth pair with two queues, in a network namespace of its own.
#![cfg(not(loom))]
#![allow(unsafe_code, reason = "system calls")]

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, BufRead, BufReader},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::Stdio,
    time::{Duration, Instant},
};

use palisade_testbed::ns::Ns;
use palisade_xsk::{Config, Error, Frame, Mode, NoRoom, Socket};
use proptest::{prelude::*, test_runner::TestRunner};

const TIMEOUT: Duration = Duration::from_secs(5);

/// An attached XDP program that redirects the packets of a queue to the socket of that queue, and its `XSKMAP`.
struct Program {
    map: OwnedFd,
    _program: OwnedFd,
    _link: OwnedFd,
}

fn bpf(command: libc::c_long, attributes: &mut [u8; 128]) -> io::Result<OwnedFd> {
    // SAFETY: the length is that of the attributes, and the caller keeps alive what they point to.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), attributes.len()) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: these commands return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(outcome as i32) })
}

fn attributes(words: &[(usize, u32)]) -> [u8; 128] {
    let mut bytes = [0; 128];
    for (at, word) in words {
        bytes[*at..*at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

impl Program {
    fn attach(ifindex: u32) -> Self {
        const MAP_CREATE: libc::c_long = 0;
        const PROG_LOAD: libc::c_long = 5;
        const LINK_CREATE: libc::c_long = 28;
        const XSKMAP: u32 = 17;
        let map = bpf(
            MAP_CREATE,
            &mut attributes(&[(0, XSKMAP), (4, 4), (8, 4), (12, 4)]),
        )
        .unwrap();
        let instruction = |code: u8, registers: u8, offset: i16, value: i32| {
            let mut bytes = [code, registers, 0, 0, 0, 0, 0, 0];
            bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
            bytes[4..].copy_from_slice(&value.to_ne_bytes());
            bytes
        };
        let instructions = [
            // r2 = context->rx_queue_index
            instruction(0x61, 0x12, 16, 0),
            // r1 = map
            instruction(0x18, 0x11, 0, map.as_raw_fd()),
            instruction(0, 0, 0, 0),
            // r3 = XDP_DROP, the result if the map has no socket
            instruction(0xb7, 0x03, 0, 1),
            // return bpf_redirect_map(r1, r2, r3)
            instruction(0x85, 0, 0, 51),
            instruction(0x95, 0, 0, 0),
        ]
        .concat();
        let license = c"GPL";
        let mut load = attributes(&[(0, 6), (4, instructions.len() as u32 / 8)]);
        load[8..16].copy_from_slice(&(instructions.as_ptr() as u64).to_ne_bytes());
        load[16..24].copy_from_slice(&(license.as_ptr() as u64).to_ne_bytes());
        let program = bpf(PROG_LOAD, &mut load).unwrap();
        // BPF_XDP, in native mode.
        let link = [(0, program.as_raw_fd() as u32), (4, ifindex), (8, 37), (12, 4)];
        let link = bpf(LINK_CREATE, &mut attributes(&link)).unwrap();
        Self {
            map,
            _program: program,
            _link: link,
        }
    }

    fn set(&self, queue: u32, socket: &Socket) {
        let value = socket.as_raw_fd();
        let mut update = attributes(&[(0, self.map.as_raw_fd() as u32)]);
        update[8..16].copy_from_slice(&(&raw const queue as u64).to_ne_bytes());
        update[16..24].copy_from_slice(&(&raw const value as u64).to_ne_bytes());
        // SAFETY: the length is that of the attributes; key and value are on this function's stack.
        let outcome =
            unsafe { libc::syscall(libc::SYS_bpf, 2 as libc::c_long, update.as_ptr(), update.len()) };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    }
}

/// A network namespace with the veth pair `a` and `b`. The calling thread is in it.
struct World {
    ns: Ns,
    a: Program,
    b: Program,
}

impl World {
    fn new() -> Self {
        let ns = Ns::new("xsk").unwrap();
        ns.sysctl("ipv6/conf/default/disable_ipv6", "1").unwrap();
        ns.ip(
            "link add name a numtxqueues 2 numrxqueues 2 type veth peer name b numtxqueues 2 numrxqueues 2\n\
             link set dev a up\nlink set dev b up",
        )
        .unwrap();
        ns.join().unwrap();
        let a = Program::attach(ns.ifindex("a").unwrap());
        let b = Program::attach(ns.ifindex("b").unwrap());
        Self { ns, a, b }
    }

    fn socket(&self, config: &Config) -> Socket {
        let socket = Socket::new(config).unwrap();
        let program = if config.interface == "a" { &self.a } else { &self.b };
        program.set(config.queue, &socket);
        socket
    }

    fn pair(&self, queue: u32, frames: u32, mode: Mode) -> (Socket, Socket) {
        let config = |interface| Config {
            frames,
            mode,
            ..Config::new(interface, queue)
        };
        (self.socket(&config("a")), self.socket(&config("b")))
    }
}

/// Returns an Ethernet frame that the kernel passes on without interpreting it.
fn packet(number: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(18)];
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    // IEEE 802 local experimental EtherType 1.
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes[14..18].copy_from_slice(&number.to_be_bytes());
    let mut state = number;
    for byte in &mut bytes[18..] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    bytes
}

fn send(socket: &mut Socket, packet: &[u8]) {
    let until = Instant::now() + TIMEOUT;
    let mut frame = loop {
        match socket.alloc() {
            Some(frame) => break frame,
            None => assert!(Instant::now() < until, "no frame is freed: {:?}", socket.counts()),
        }
        socket.flush().unwrap();
    };
    frame.set(packet).unwrap();
    while let Err(back) = socket.send(frame) {
        assert!(Instant::now() < until, "the ring stays full");
        frame = back;
        socket.flush().unwrap();
    }
}

fn receive(socket: &mut Socket, count: usize) -> VecDeque<Frame> {
    let until = Instant::now() + TIMEOUT;
    let mut frames = VecDeque::with_capacity(count);
    while frames.len() < count {
        let left = count - frames.len();
        socket.receive(&mut frames, left).unwrap();
        if frames.len() < count && !socket.wait(Duration::from_millis(20)).unwrap() {
            assert!(
                Instant::now() < until,
                "{} of {count}: {:?} {:?}",
                frames.len(),
                socket.counts(),
                socket.statistics()
            );
        }
    }
    frames
}

fn wait_until_all_frames_are_back(socket: &mut Socket, frames: usize) {
    let until = Instant::now() + TIMEOUT;
    while socket.counts().sending != 0 {
        assert!(Instant::now() < until, "{:?}", socket.counts());
        socket.flush().unwrap();
    }
    let counts = socket.counts();
    assert_eq!((counts.held, counts.total()), (0, frames), "{counts:?}");
    assert_eq!(socket.statistics().unwrap().unexpected, 0);
}

#[test]
fn random_packets_arrive_unchanged_in_both_directions() {
    for mode in [Mode::Poll, Mode::Spin, Mode::BusyPoll] {
        let world = World::new();
        let (a, b) = world.pair(0, 256, mode);
        assert!(!a.zero_copy());
        let sockets = RefCell::new((a, b));
        let lengths = prop::collection::vec(18usize..1514, 1..60);
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 24,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        runner
            .run(&lengths, |lengths| {
                let (a, b) = &mut *sockets.borrow_mut();
                let packets: Vec<_> = lengths
                    .iter()
                    .enumerate()
                    .map(|(n, length)| packet(n as u32, *length))
                    .collect();
                packets.iter().for_each(|packet| send(a, packet));
                a.flush().unwrap();
                for (frame, packet) in receive(b, packets.len()).into_iter().zip(&packets) {
                    prop_assert_eq!(frame.data(), &packet[..]);
                    // Send the same frame back.
                    b.send(frame).unwrap();
                }
                b.flush().unwrap();
                for (frame, packet) in receive(a, packets.len()).into_iter().zip(&packets) {
                    prop_assert_eq!(frame.data(), &packet[..]);
                }
                wait_until_all_frames_are_back(a, 256);
                wait_until_all_frames_are_back(b, 256);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn a_packet_can_be_stripped_prepended_and_appended_in_its_frame() {
    let world = World::new();
    let (mut a, mut b) = world.pair(0, 64, Mode::Poll);
    let sent = packet(7, 300);
    let prefix = [9; 72];
    send(&mut a, &[&sent[..14], &prefix, &sent[14..]].concat());
    a.flush().unwrap();
    let mut frame = receive(&mut b, 1).pop_front().unwrap();
    assert_eq!(frame.len(), 372);
    // The result is the packet as it was sent, with bytes appended.
    frame.strip(14 + 72).unwrap();
    frame.prepend(&sent[..14]).unwrap();
    frame.append(b"behind").unwrap();
    assert_eq!(frame.data(), [&sent[..], b"behind"].concat());
    b.send(frame).unwrap();
    b.flush().unwrap();
    let mut frame = receive(&mut a, 1).pop_front().unwrap();
    assert_eq!(frame.data(), [&sent[..], b"behind"].concat());
    // There is no headroom, so the packet is moved.
    frame.prepend(&prefix).unwrap();
    assert_eq!(frame.data(), [&prefix[..], &sent, b"behind"].concat());
    let tail = frame.tailroom();
    frame.append(&vec![1; tail]).unwrap();
    assert_eq!(frame.append(&[1]), Err(NoRoom));
    assert_eq!(frame.prepend(&[1]), Err(NoRoom));
    assert_eq!(frame.strip(frame.len() + 1), Err(NoRoom));
    frame.strip(10).unwrap();
    frame.append(&[2; 10]).unwrap();
    assert!(frame.data().ends_with(&[1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]));
    assert_eq!(frame.set(&[0; 4096]), Err(NoRoom));
    assert_eq!(frame.set_len(4096), Err(NoRoom));
    // A socket refuses a frame of another socket.
    let mut frame = b.send(frame).unwrap_err();
    frame.set(&[]).unwrap();
    drop(a.send(frame).unwrap_err());
    wait_until_all_frames_are_back(&mut a, 64);
    wait_until_all_frames_are_back(&mut b, 64);
}

#[test]
fn a_receiver_that_holds_all_frames_loses_counted_packets_and_no_frame() {
    let world = World::new();
    let (mut a, mut b) = world.pair(0, 64, Mode::Poll);
    let mut held = VecDeque::new();
    for n in 0..200 {
        send(&mut a, &packet(n, 64));
        a.flush().unwrap();
        b.wait(Duration::from_millis(5)).unwrap();
        b.receive(&mut held, 64).unwrap();
    }
    let statistics = b.statistics().unwrap();
    let received = held.len() as u64;
    assert!(statistics.rx_fill_ring_empty > 0, "{statistics:?}");
    assert_eq!(
        received + statistics.rx_dropped + statistics.rx_ring_full,
        200,
        "{statistics:?}"
    );
    assert_eq!(statistics.rx_fill_ring_empty, statistics.rx_dropped);
    assert_eq!((b.counts().held, b.counts().total()), (held.len(), 64));
    // The reserve is left for packets that the socket's owner makes.
    let own = b.alloc().unwrap();
    drop(own);
    // Packets arrive in the order in which they were sent, each once.
    for (n, frame) in held.iter().enumerate() {
        assert_eq!(frame.data(), packet(n as u32, 64));
    }
    held.clear();
    wait_until_all_frames_are_back(&mut b, 64);
    b.receive(&mut held, 64).unwrap();
    send(&mut a, &packet(1000, 64));
    a.flush().unwrap();
    assert_eq!(receive(&mut b, 1)[0].data(), packet(1000, 64));
    wait_until_all_frames_are_back(&mut b, 64);
}

#[test]
fn a_full_transmit_ring_returns_the_frame() {
    let world = World::new();
    let (mut a, mut b) = world.pair(0, 64, Mode::Poll);
    send(&mut b, &packet(32, 100));
    b.flush().unwrap();
    let own = receive(&mut a, 1).pop_front().unwrap();
    let mut sent = 0;
    while let Some(mut frame) = a.alloc() {
        frame.set(&packet(sent, 100)).unwrap();
        a.send(frame).unwrap();
        sent += 1;
    }
    // The other half of the frames is in the fill ring.
    assert_eq!((sent, a.unsent()), (32, 32));
    let back = a.send(own).unwrap_err();
    assert_eq!(back.data(), packet(32, 100));
    assert_eq!(a.counts().sending, 32);
    // More than the kernel sends per wake-up, so it is woken again.
    assert_eq!(a.flush().unwrap(), 0);
    a.send(back).unwrap();
    a.flush().unwrap();
    // The other socket's fill ring has 32 entries: the packet after them may have found no frame.
    let received = receive(&mut b, 32);
    for (n, frame) in received.iter().enumerate() {
        assert_eq!(frame.data(), packet(n as u32, 100));
    }
    drop(received);
    wait_until_all_frames_are_back(&mut a, 64);
    wait_until_all_frames_are_back(&mut b, 64);
}

#[test]
fn each_queue_has_its_own_socket() {
    let world = World::new();
    let (mut a0, mut b0) = world.pair(0, 64, Mode::Poll);
    let (mut a1, mut b1) = world.pair(1, 64, Mode::Poll);
    for n in 0..20 {
        send(&mut a0, &packet(n, 80));
        send(&mut a1, &packet(1000 + n, 90));
    }
    a0.flush().unwrap();
    a1.flush().unwrap();
    for (n, (zero, one)) in receive(&mut b0, 20).iter().zip(&receive(&mut b1, 20)).enumerate() {
        assert_eq!(zero.data(), packet(n as u32, 80));
        assert_eq!(one.data(), packet(1000 + n as u32, 90));
    }
    assert_eq!((b0.rx_available(), b1.rx_available()), (0, 0));
}

#[test]
fn binding_is_retried_while_the_queue_is_in_use() {
    let world = World::new();
    let (_a, b) = world.pair(0, 64, Mode::Poll);
    let config = Config {
        frames: 64,
        bind_timeout: Duration::from_millis(60),
        ..Config::new("b", 0)
    };
    let started = Instant::now();
    let error = Socket::new(&config).unwrap_err();
    assert!(matches!(error, Error::Busy { queue: 0, .. }), "{error}");
    assert!(started.elapsed() >= config.bind_timeout);
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::ResourceBusy);

    let config = Config {
        bind_timeout: TIMEOUT,
        ..config
    };
    std::thread::scope(|scope| {
        // The new thread is in the same network namespace.
        let waiting = scope.spawn(|| Socket::new(&config).map(|_| ()));
        std::thread::sleep(Duration::from_millis(100));
        drop(b);
        waiting.join().unwrap().unwrap();
    });
    // The new socket receives packets.
    let mut b = world.socket(&config);
    // The first `a` releases its queue.
    drop(_a);
    let mut a = world.socket(&Config {
        interface: "a".into(),
        ..config
    });
    send(&mut a, &packet(1, 60));
    a.flush().unwrap();
    assert_eq!(receive(&mut b, 1)[0].data(), packet(1, 60));
}

#[test]
fn a_held_frame_keeps_the_umem_and_the_queue() {
    let world = World::new();
    let (mut a, mut b) = world.pair(0, 64, Mode::Poll);
    send(&mut a, &packet(5, 500));
    a.flush().unwrap();
    let frame = receive(&mut b, 1).pop_front().unwrap();
    drop(b);
    assert_eq!(frame.data(), packet(5, 500));
    let config = Config {
        frames: 64,
        bind_timeout: Duration::from_millis(20),
        ..Config::new("b", 0)
    };
    assert!(matches!(Socket::new(&config), Err(Error::Busy { .. })));
    drop(frame);
    Socket::new(&Config {
        bind_timeout: TIMEOUT,
        ..config
    })
    .unwrap();
}

#[test]
fn invalid_configurations_give_specific_errors() {
    let world = World::new();
    let of = |interface: &str, queue, frames| {
        Socket::new(&Config {
            frames,
            ..Config::new(interface, queue)
        })
        .unwrap_err()
    };
    assert!(matches!(of("b", 0, 100), Error::Frames(100)));
    assert!(matches!(of("b", 0, 8), Error::Frames(8)));
    assert!(matches!(of("", 0, 64), Error::Name(_)));
    for error in [of("missing", 0, 64), of("b", 2, 64)] {
        assert!(matches!(error, Error::Bind { .. }), "{error}");
    }
    drop(world);
}

#[test]
fn a_deleted_interface_gives_lasting_errors() {
    let world = World::new();
    let (mut a, mut b) = world.pair(0, 64, Mode::Poll);
    assert!(!b.wait(Duration::from_millis(10)).unwrap());
    world.ns.ip("link del dev a").unwrap();
    let started = Instant::now();
    while b.wait(Duration::from_millis(20)).is_ok() {
        assert!(started.elapsed() < TIMEOUT);
    }
    // The error stays.
    assert!(b.wait(Duration::from_millis(1)).is_err());
    assert!(b.statistics().is_err());
    let mut frame = a.alloc().unwrap();
    frame.set(&packet(1, 60)).unwrap();
    a.send(frame).unwrap();
    assert!(a.flush().is_err());
}

/// Not a test: the child process that the next test kills.
#[test]
#[ignore = "runs as a child of another test"]
fn child_that_holds_a_queue() {
    let _socket = Socket::new(&Config::new("b", 0)).unwrap();
    println!("bound");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_queue_of_a_killed_process_can_be_bound_again() {
    let world = World::new();
    for _ in 0..3 {
        let mut child = world
            .ns
            .command(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_holds_a_queue", "--ignored", "--nocapture"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // The test harness may print the test's name on the same line.
        assert!(lines.any(|line| line.unwrap().ends_with("bound")));
        let config = Config {
            frames: 64,
            bind_timeout: Duration::ZERO,
            ..Config::new("b", 0)
        };
        assert!(matches!(Socket::new(&config), Err(Error::Busy { .. })));
        child.kill().unwrap();
        let mut b = world.socket(&Config {
            bind_timeout: TIMEOUT,
            ..config
        });
        child.wait().unwrap();
        let mut a = world.socket(&Config {
            frames: 64,
            ..Config::new("a", 0)
        });
        send(&mut a, &packet(3, 70));
        a.flush().unwrap();
        assert_eq!(receive(&mut b, 1)[0].data(), packet(3, 70));
    }
}
