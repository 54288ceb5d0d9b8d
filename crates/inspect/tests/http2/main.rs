//! The HTTP/2 filter between a client and a server, both of which the tests play frame by frame.

mod attacks;

mod conformance;
mod h2spec;
mod join;
mod link;
mod overdue;
mod peers;
mod requests;
mod settings;
mod splits;
