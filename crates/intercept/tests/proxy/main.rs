//! The proxy between real sockets on loopback: TLS clients and servers around it, both with `rustls`.

mod check;
mod failures;
mod http1;
mod http2;
mod limits;
mod namespace;
mod overdue;
mod policy;
mod tls;
mod world;
