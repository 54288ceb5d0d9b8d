//! The proxy between real sockets on loopback: TLS clients and servers around it, both with `rustls`.

mod http1;
mod world;
