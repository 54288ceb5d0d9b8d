//! The metrics of Palisade itself.

use crate::{Definition, Kind};

macro_rules! definitions {
    ($($constant:ident = $name:literal, $kind:ident, $unit:expr, [$($label:literal),*], $help:literal;)*) => {
        $(#[doc = $help] pub static $constant: Definition = Definition {
            name: $name,
            help: $help,
            kind: Kind::$kind,
            unit: $unit,
            labels: &[$($label),*],
        };)*
        /// All metrics of Palisade itself.
        pub static ALL: &[&Definition] = &[$(&$constant),*];
    };
}

const NONE: Option<&str> = None;
const BYTES: Option<&str> = Some("bytes");
const SECONDS: Option<&str> = Some("seconds");

/// Bounds of the buckets of [`POLICY_ENFORCEMENT`], s.
pub const ENFORCEMENT_BOUNDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

definitions! {
    BUILD = "palisade_build_info", Info, NONE, ["version"],
        "Version of the daemon.";
    READY = "palisade_ready", Gauge, NONE, [],
        "Whether everything is attached and in force (1), as status --wait requires.";
    MISSING = "palisade_missing", Gauge, NONE, [],
        "Number of reasons why not everything is attached and in force.";
    WARNINGS = "palisade_warnings", Gauge, NONE, [],
        "Number of problems that do not affect what is enforced.";
    CONTROL_UP = "palisade_control_thread_up", Gauge, NONE, [],
        "Whether the control thread answered this scrape (1); if not, its values are those of its last answer.";
    CONTROL_BUSY = "palisade_control_thread_busy_seconds", Gauge, SECONDS, [],
        "Time for which the control thread has been busy with its current task; 0 if it waits for one.";

    POLICY_REVISION = "palisade_policy_revision", Gauge, NONE, [],
        "Number of changes that this daemon has put in force.";
    POLICY_FILES = "palisade_policy_files", Gauge, NONE, ["state"],
        "Number of files of the policy folder: in force, with their last good content in force, or unused.";
    POLICIES = "palisade_policies", Gauge, NONE, [],
        "Number of policies in force.";
    POLICY_ENFORCEMENT = "palisade_policy_enforcement_delay_seconds", Histogram, SECONDS, [],
        "Time from the first event of a changed policy file to the write of the last map entry.";
    POLICY_LAST_CHANGE = "palisade_policy_last_change_seconds", Gauge, SECONDS, [],
        "Duration of the last change, from its beginning to the write of the last map entry.";
    ENDPOINTS = "palisade_endpoints", Gauge, NONE, ["direction", "enforcement"],
        "Number of endpoints by the enforcement of a direction.";
    REFUSED_WORKLOADS = "palisade_refused_workloads", Gauge, NONE, [],
        "Number of found workloads that are no endpoints and stay denied, without those that start.";
    WORKLOAD_CONFLICTS = "palisade_workload_conflicts_total", Counter, NONE, [],
        "Times that a found workload claimed a name, an interface or an address of another.";
    INTERFACE_GUARDED = "palisade_interface_guarded", Gauge, NONE, ["interface", "role"],
        "Whether all programs are attached to a configured interface (1).";

    DROP_PACKETS = "palisade_drop_packets_total", Counter, NONE, ["reason", "direction"],
        "Packets dropped by the programs and the nftables table.";
    DROP_BYTES = "palisade_drop_bytes_total", Counter, BYTES, ["reason", "direction"],
        "Bytes of the packets dropped by the programs and the nftables table.";
    PASS_PACKETS = "palisade_pass_packets_total", Counter, NONE, ["reason", "direction"],
        "Packets passed by the programs.";
    PASS_BYTES = "palisade_pass_bytes_total", Counter, BYTES, ["reason", "direction"],
        "Bytes of the packets passed by the programs.";
    RULE_PACKETS = "palisade_rule_packets_total", Counter, NONE, ["rule", "policy", "description"],
        "Packets that a rule has decided.";
    RULE_BYTES = "palisade_rule_bytes_total", Counter, BYTES, ["rule", "policy", "description"],
        "Bytes of the packets that a rule has decided.";

    MAP_ENTRIES = "palisade_map_entries", Gauge, NONE, ["map"],
        "Number of entries of a map.";
    MAP_CAPACITY = "palisade_map_max_entries", Gauge, NONE, ["map"],
        "Largest number of entries of a map.";
    CONNTRACK_MADE = "palisade_conntrack_made_total", Counter, NONE, [],
        "Conntrack entries made by packets.";
    CONNTRACK_SEEDED = "palisade_conntrack_seeded_total", Counter, NONE, [],
        "Conntrack entries made from the kernel's own tables when Palisade was first attached.";
    CONNTRACK_SWEPT = "palisade_conntrack_swept_total", Counter, NONE, [],
        "Conntrack entries removed because they had expired or their endpoint was removed.";
    CONNTRACK_EVICTED = "palisade_conntrack_evicted_total", Counter, NONE, [],
        "Conntrack entries evicted by newer flows.";
    CONNTRACK_PROTECTED = "palisade_conntrack_protected_entries", Gauge, NONE, [],
        "Number of flows that newer flows do not evict.";

    EVENTS_READ = "palisade_events_read_total", Counter, NONE, [],
        "Events of the programs that the daemon has read.";
    EVENTS_SUPPRESSED = "palisade_events_suppressed_total", Counter, NONE, ["kind", "reason"],
        "Events that the programs did not send because of the rate limit.";
    EVENTS_LOST = "palisade_events_lost_total", Counter, NONE, ["kind", "reason"],
        "Events that the programs did not send because the event ring was full.";
    FLOWS_RECORDED = "palisade_flows_recorded_total", Counter, NONE, [],
        "Flow records written to the flow ring.";
    FLOW_RING_ENTRIES = "palisade_flow_ring_entries", Gauge, NONE, [],
        "Number of flow records in the flow ring.";
    FLOW_RING_CAPACITY = "palisade_flow_ring_max_entries", Gauge, NONE, [],
        "Largest number of flow records in the flow ring.";

    CAPTURE_RUNNING = "palisade_capture_running", Gauge, NONE, [],
        "Whether a capture of packets runs (1).";
    CAPTURED_PACKETS = "palisade_captured_packets_total", Counter, NONE, [],
        "Packets that captures have sent to their clients.";

    WORKER_UP = "palisade_worker_up", Gauge, NONE, ["worker"],
        "Whether a worker inspects packets (1).";
    WORKER_RESTARTS = "palisade_worker_restarts_total", Counter, NONE, ["worker"],
        "Restarts of a worker after a failure.";
    WORKER_RECEIVED_PACKETS = "palisade_worker_punted_packets_total", Counter, NONE, ["worker"],
        "Punted packets that a worker has received.";
    WORKER_RECEIVED_BYTES = "palisade_worker_punted_bytes_total", Counter, BYTES, ["worker"],
        "Bytes of the punted packets that a worker has received.";
    WORKER_REINJECTED_PACKETS = "palisade_worker_reinjected_packets_total", Counter, NONE, ["worker"],
        "Punted packets that a worker has reinjected.";
    WORKER_REINJECTED_BYTES = "palisade_worker_reinjected_bytes_total", Counter, BYTES, ["worker"],
        "Bytes of the punted packets that a worker has reinjected.";
    WORKER_GENERATED = "palisade_worker_generated_packets_total", Counter, NONE, ["worker"],
        "Packets that a worker has generated and sent.";
    WORKER_GENERATED_LOST = "palisade_worker_generated_lost_packets_total", Counter, NONE, ["worker"],
        "Generated packets that were not sent, for lack of a frame or of space in the TX ring.";
    WORKER_ABSORBED = "palisade_worker_absorbed_packets_total", Counter, NONE, ["worker"],
        "Held packets whose bytes were delivered in generated packets.";
    WORKER_OPTIONS = "palisade_worker_rewritten_options_packets_total", Counter, NONE, ["worker"],
        "Packets whose TCP options a worker has rewritten.";
    WORKER_HANDOFF_OUT = "palisade_worker_handoff_sent_packets_total", Counter, NONE, ["worker"],
        "Packets that a worker has handed off to the workers that own their flows.";
    WORKER_HANDOFF_IN = "palisade_worker_handoff_received_packets_total", Counter, NONE, ["worker"],
        "Packets that other workers have handed off to this one.";
    WORKER_DROPPED = "palisade_worker_dropped_packets_total", Counter, NONE, ["worker", "reason"],
        "Punted packets that a worker has dropped, or that were lost at the rings of its socket (OVERLOADED).";
    WORKER_HELD = "palisade_worker_held_frames", Gauge, NONE, ["worker"],
        "Number of frames with packets that wait for a verdict.";
    WORKER_FRAMES = "palisade_worker_frames", Gauge, NONE, ["worker"],
        "Number of frames of a worker's socket.";
    WORKER_MEMORY = "palisade_worker_umem_bytes", Gauge, BYTES, ["worker"],
        "Memory of the frames of a worker's socket.";
    WORKER_FLOWS = "palisade_worker_flows", Gauge, NONE, ["worker"],
        "Number of TCP connections that a worker tracks.";
    WORKER_RECORDS_LOST = "palisade_worker_records_lost_total", Counter, NONE, ["worker"],
        "Records of inspectors that were lost because the queue was full.";
    WORKER_SLEEPS = "palisade_worker_sleeps_total", Counter, NONE, ["worker"],
        "Number of times that a worker has waited for packets.";
    WORKER_RING_LOST = "palisade_worker_ring_lost_packets_total", Counter, NONE, ["worker", "cause"],
        "Packets lost at the rings of a worker's socket.";
    WORKER_RING_STARVED = "palisade_worker_fill_ring_empty_total", Counter, NONE, ["worker"],
        "Number of times that the kernel found the fill ring of a worker's socket empty.";

    INSPECTION_EVENTS = "palisade_inspection_events_total", Counter, NONE, ["group", "event"],
        "Events of the inspectors of all workers, offloads included.";
    INSPECTION_ITEMS = "palisade_inspection_items", Gauge, NONE, ["group", "item"],
        "What the inspectors of all workers hold now.";
    INSPECTED_CONNECTIONS = "palisade_inspected_connections", Gauge, NONE, [],
        "Number of inspected connections.";
    OFFLOADED_CONNECTIONS = "palisade_offloaded_connections", Gauge, NONE, [],
        "Number of offloaded connections.";
    INSPECTION_STREAM = "palisade_inspection_unacknowledged_bytes", Gauge, BYTES, [],
        "Bytes of streams that the inspectors keep because receivers have not acknowledged them.";
    INSPECTION_HELD = "palisade_inspection_held_packets", Gauge, NONE, [],
        "Number of packets that wait for a verdict of an inspector.";

    LEARNED_NAMES = "palisade_learned_names", Gauge, NONE, [],
        "Number of learned names, counted for each endpoint.";
    LEARNED_ADDRESSES = "palisade_learned_addresses", Gauge, NONE, [],
        "Number of addresses of learned names.";
    LEARNED_IN_MAP = "palisade_learned_addresses_in_map", Gauge, NONE, [],
        "Number of learned addresses in the map.";
    LEARNED_UNWRITTEN = "palisade_learned_addresses_unwritten", Gauge, NONE, [],
        "Number of learned addresses whose map entry is missing or outdated.";
    LEARNED_BYTES = "palisade_learned_names_bytes", Gauge, BYTES, [],
        "Memory of the learned names.";
    ANSWERS = "palisade_dns_answers_total", Counter, NONE, ["outcome"],
        "DNS answers whose addresses were learned: committed, withheld, waited for an identity.";
    ADDRESSES = "palisade_learned_address_events_total", Counter, NONE, ["event"],
        "Addresses that were evicted, have expired, or were not learned.";
    LEARNED_FAILURES = "palisade_learned_write_failures_total", Counter, NONE, [],
        "Failed writes of learned addresses to the map.";

    CERTIFICATE_EXPIRY = "palisade_certificate_expiry_timestamp_seconds", Gauge, SECONDS, ["secret", "key", "index", "subject"],
        "End of the validity of a certificate of the secrets folder, or of a listener, Unix time.";
    SECRET_PROBLEMS = "palisade_secret_problems", Gauge, NONE, [],
        "Number of problems of the secrets folder and of secrets that policies name.";

    PROXY_CONNECTIONS = "palisade_proxy_connections", Gauge, NONE, ["thread"],
        "Number of open intercepted connections.";
    PROXY_UP = "palisade_proxy_thread_up", Gauge, NONE, ["thread"],
        "Whether a thread of the proxy runs (1).";
    PROXY_RESTARTS = "palisade_proxy_restarts_total", Counter, NONE, ["thread"],
        "Restarts of a thread of the proxy after a failure.";
    PROXY_EVENTS = "palisade_proxy_events_total", Counter, NONE, ["event"],
        "Events of intercepted connections.";
    PROXY_BYTES = "palisade_proxy_bytes_total", Counter, BYTES, ["from"],
        "Decrypted bytes of intercepted connections, from clients and from servers.";
    PROXY_FAILURES = "palisade_proxy_failures_total", Counter, NONE, ["reason"],
        "Failed connections of the proxy to servers.";

    CONTROL_CLIENTS = "palisade_control_clients", Gauge, NONE, ["kind"],
        "Number of clients of the control socket, and of those that follow flows.";
    CONTROL_CLIENTS_ENDED = "palisade_control_clients_ended_total", Counter, NONE, ["cause"],
        "Clients of the control socket that were disconnected because they were slow, or refused because of their number.";

    OVERFLOWS = "palisade_metrics_overflows_total", Counter, NONE, ["metric"],
        "Number of times that a time series beyond the limit was counted under _overflow.";
    ENDED = "palisade_metrics_ended_series_total", Counter, NONE, ["metric"],
        "Time series of endpoints, peers and identities that were removed after these.";
    SCRAPE_SECONDS = "palisade_metrics_collect_seconds", Gauge, SECONDS, [],
        "Time to read the values of this scrape.";
    CLIENTS = "palisade_metrics_clients", Gauge, NONE, [],
        "Number of connections of the metrics server.";
    CLIENTS_ENDED = "palisade_metrics_clients_ended_total", Counter, NONE, ["cause"],
        "Connections that the metrics server has closed: idle ones in favour of new ones, or new ones beyond the limit.";

    PROCESS_CPU = "process_cpu_seconds_total", Counter, SECONDS, [],
        "User and system CPU time of the process.";
    PROCESS_RESIDENT = "process_resident_memory_bytes", Gauge, BYTES, [],
        "Resident memory of the process.";
    PROCESS_VIRTUAL = "process_virtual_memory_bytes", Gauge, BYTES, [],
        "Virtual memory of the process.";
    PROCESS_FDS = "process_open_fds", Gauge, NONE, [],
        "Number of open file descriptors of the process.";
    PROCESS_MAX_FDS = "process_max_fds", Gauge, NONE, [],
        "Largest number of open file descriptors of the process.";
    PROCESS_THREADS = "process_threads", Gauge, NONE, [],
        "Number of threads of the process.";
    PROCESS_START = "process_start_time_seconds", Gauge, SECONDS, [],
        "Start of the process, Unix time.";
}
