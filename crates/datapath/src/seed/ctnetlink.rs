//! Reads nf_conntrack by ctnetlink, for kernels without `/proc/net/nf_conntrack`. Hand-written: `netlink-packet-route`
//! does not cover nfnetlink.

use palisade_abi::{Addr, protocol};

use super::connection::{Connection, End, Progress, SeedError, both_views};
use crate::sys::netlink::{Request, Socket, find};

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;

pub(super) fn tracked() -> Result<Vec<Connection>, SeedError> {
    let mut found = Vec::new();
    // struct nfgenmsg: AF_UNSPEC, version 0.
    let request = Request::new(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, 0).fixed(&[0; 4]);
    let answer = Socket::open(libc::NETLINK_NETFILTER).and_then(|mut socket| {
        socket.query(
            request,
            libc::NLM_F_DUMP,
            "IPCTNL_MSG_CT_GET",
            &mut |kind, payload| {
                if kind == NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW {
                    found.extend(
                        payload
                            .get(4..)
                            .and_then(parse_ctnetlink)
                            .into_iter()
                            .flatten()
                            .flatten(),
                    );
                }
            },
        )
    });
    match answer {
        // The kernel has no nf_conntrack or no ctnetlink, so no connection is found.
        Err(e)
            if matches!(
                e.errno(),
                libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT
            ) =>
        {
            Ok(Vec::new())
        }
        other => Ok(other.map(|()| found)?),
    }
}

/// Parses the attributes of a conntrack message (`enum ctattr_type`).
fn parse_ctnetlink(attributes: &[u8]) -> Option<[Option<Connection>; 2]> {
    const CTA_TUPLE_ORIG: u16 = 1;
    const CTA_TUPLE_REPLY: u16 = 2;
    const CTA_PROTOINFO: u16 = 4;
    const CTA_PROTOINFO_TCP: u16 = 1;
    const CTA_PROTOINFO_TCP_STATE: u16 = 1;

    let original = parse_tuple(find(attributes, CTA_TUPLE_ORIG)?)?;
    let reply = parse_tuple(find(attributes, CTA_TUPLE_REPLY)?)?;
    let state = find(attributes, CTA_PROTOINFO)
        .and_then(|info| find(info, CTA_PROTOINFO_TCP))
        .and_then(|tcp| find(tcp, CTA_PROTOINFO_TCP_STATE))?;
    // enum tcp_conntrack
    let progress = match state.first()? {
        1 | 9 => Progress::Opening,
        2..=5 => Progress::Established,
        6 | 7 => Progress::Closed,
        _ => return None,
    };
    Some(both_views(progress, original, reply))
}

/// Returns source and destination of a TCP tuple (`enum ctattr_tuple`).
fn parse_tuple(tuple: &[u8]) -> Option<(End, End)> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
    let ip = find(tuple, CTA_TUPLE_IP)?;
    let proto = find(tuple, CTA_TUPLE_PROTO)?;
    let addr = |v4: u16, v6: u16| -> Option<Addr> {
        match find(ip, v4) {
            Some(bytes) => Some(Addr::from_v4(bytes.try_into().ok()?)),
            None => Some(Addr::from_bytes(find(ip, v6)?.try_into().ok()?)),
        }
    };
    let port = |kind: u16| Some(u16::from_be_bytes(find(proto, kind)?.try_into().ok()?));
    let number = *find(proto, 1)?.first()?;
    if number != protocol::TCP {
        return None;
    }
    let source = End {
        addr: addr(1, 3)?,
        port: port(2)?,
    };
    let destination = End {
        addr: addr(2, 4)?,
        port: port(3)?,
    };
    Some((source, destination))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::connection::fixtures::tcp;

    #[test]
    fn parses_ctnetlink_messages() {
        let tuple = |request: Request, kind, src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16| {
            request.nested(kind, |t| {
                t.nested(1, |ip| ip.attr(1, &src).attr(2, &dst)).nested(2, |p| {
                    p.attr(1, &[protocol::TCP])
                        .attr(2, &sport.to_be_bytes())
                        .attr(3, &dport.to_be_bytes())
                })
            })
        };
        let request = tuple(Request::new(0, 0), 1, [10, 0, 0, 1], [10, 0, 0, 2], 4000, 80);
        let request = tuple(request, 2, [10, 0, 0, 2], [10, 0, 0, 1], 80, 4000);
        let whole = request
            .attr(3, &8_u32.to_be_bytes())
            .nested(4, |i| i.nested(1, |t| t.attr(1, &[3])));
        let [first, second] = parse_ctnetlink(whole.payload()).unwrap();
        assert_eq!(first, Some(tcp("10.0.0.1:4000", "10.0.0.2:80")));
        assert_eq!(second, None);
        assert!(parse_ctnetlink(&[]).is_none());
    }

    #[test]
    fn a_kernel_without_ctnetlink_is_no_error() {
        tracked().unwrap();
    }
}
