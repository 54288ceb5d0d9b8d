//! Offloads and driver of an interface (`SIOCETHTOOL`), of the network namespace of the calling thread. Reads only.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::SyscallError;

/// `ETHTOOL_GDRVINFO`.
const GET_DRIVER: u32 = 0x03;
/// `ETHTOOL_GFLAGS`.
const GET_FLAGS: u32 = 0x25;
/// `ETH_FLAG_RXVLAN`: the NIC removes the VLAN tag from the frame.
pub(crate) const FLAG_RX_VLAN: u32 = 1 << 8;
/// `ETH_FLAG_LRO`.
pub(crate) const FLAG_LRO: u32 = 1 << 15;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_drvinfo`.
#[repr(C)]
struct Driver {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rom: [u8; 32],
    reserved: [u8; 12],
    counts: [u32; 5],
}

/// Returns the flags of an interface (`ETH_FLAG_*`).
pub(crate) fn flags(name: &str) -> Result<u32, SyscallError> {
    let mut value = Value {
        command: GET_FLAGS,
        data: 0,
    };
    // SAFETY: the kernel writes a `struct ethtool_value` for this command.
    unsafe { ioctl(name, &mut value) }?;
    Ok(value.data)
}

/// Returns the name of the driver.
pub(crate) fn driver(name: &str) -> Result<String, SyscallError> {
    let mut info = Driver {
        command: GET_DRIVER,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rom: [0; 32],
        reserved: [0; 12],
        counts: [0; 5],
    };
    // SAFETY: the kernel writes a `struct ethtool_drvinfo` for this command.
    unsafe { ioctl(name, &mut info) }?;
    let end = info.driver.iter().position(|byte| *byte == 0).unwrap_or(32);
    Ok(String::from_utf8_lossy(&info.driver[..end]).into_owned())
}

/// Sends a command of ethtool.
///
/// # Safety
/// `T` must be the structure that the kernel reads and writes for the command in its first field.
unsafe fn ioctl<T>(name: &str, value: &mut T) -> Result<(), SyscallError> {
    let call = || format!("SIOCETHTOOL of {name}");
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(SyscallError::last(call()));
    }
    // SAFETY: `fd` was just opened, and no other value owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: zero is a valid value of every field.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(SyscallError::new(call(), io::ErrorKind::InvalidInput.into()));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(value).cast();
    // SAFETY: `request` and `value` live until the call returns; the caller guarantees the type of `value`.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) } < 0 {
        return Err(SyscallError::last(call()));
    }
    Ok(())
}
