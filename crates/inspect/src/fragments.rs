/// How much may be held of fragmented datagrams, and for how long. Of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentLimits {
    /// Datagrams that are not complete.
    pub datagrams: usize,
    /// Of them, those of one endpoint.
    pub datagrams_per_endpoint: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// Fragments of all of them: so many frames are held.
    pub fragments: usize,
    /// A datagram that is not complete so long after its first fragment is dropped.
    pub timeout: u64,
}

impl Default for FragmentLimits {
    fn default() -> Self {
        Self {
            datagrams: 256,
            datagrams_per_endpoint: 64,
            bytes: 4 << 20,
            fragments: 512,
            timeout: 5000,
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FragmentStats {
    /// Fragments that came.
    pub fragments: u64,
    /// Datagrams that were put together.
    pub complete: u64,
    /// Datagrams whose fragments did not all come in time.
    pub incomplete: u64,
    /// Datagrams that were dropped because their fragments contradict each other.
    pub contradicting: u64,
    /// Fragments that were dropped because they came twice.
    pub duplicates: u64,
    /// Datagrams that were dropped because a limit is reached.
    pub limited: u64,
    /// Datagrams that wait now.
    pub held: u64,
}
