//! Encoding of requests and responses. Requests with fields that this server does not know are refused, since ignoring
//! a filter would show flows that the client did not ask for. A response can be bytes that were encoded once for all
//! readers.

use std::marker::PhantomData;

use bytes::{Buf as _, BufMut as _, Bytes};
use prost::Message;
use tonic::{
    Status,
    codec::{DecodeBuf, EncodeBuf},
};

use crate::schema;

/// Encoded message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded(pub Bytes);

/// A message that can be written to a response or request.
pub trait Outgoing: Send + 'static {
    /// Appends the encoded message.
    ///
    /// # Errors
    /// Fails if the buffer has no room.
    fn write(&self, buffer: &mut EncodeBuf<'_>) -> Result<(), Status>;
}

impl Outgoing for Encoded {
    fn write(&self, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&self.0);
        Ok(())
    }
}

impl<M: Message + 'static> Outgoing for M {
    fn write(&self, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        self.encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

/// A message that can be read from a request or response.
pub trait Incoming: Sized + Send + 'static {
    /// Decodes a message.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` if the bytes are not such a message, contain unknown fields or too many messages.
    fn read(bytes: Bytes) -> Result<Self, Status>;
}

impl<M: Message + prost::Name + Default + 'static> Incoming for M {
    fn read(bytes: Bytes) -> Result<Self, Status> {
        let bad = |error: &dyn std::fmt::Display| {
            Status::invalid_argument(format!("the message {} cannot be read: {error}", M::full_name()))
        };
        let known = schema::Message::of(&M::full_name())
            .ok_or_else(|| Status::internal(format!("no definition of {}", M::full_name())))?;
        if let Some(reason) = schema::refusal(known, &bytes).map_err(|error| bad(&error))? {
            return Err(Status::invalid_argument(reason));
        }
        Self::decode(bytes).map_err(|error| bad(&error))
    }
}

impl Incoming for Encoded {
    fn read(bytes: Bytes) -> Result<Self, Status> {
        Ok(Self(bytes))
    }
}

/// Codec of all methods.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Outgoing, U: Incoming> tonic::codec::Codec for Codec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = Encoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Encoder<T> {
        Encoder(PhantomData)
    }

    fn decoder(&mut self) -> Decoder<U> {
        Decoder(PhantomData)
    }
}

/// Encoder of [`Codec`].
#[derive(Debug)]
pub struct Encoder<T>(PhantomData<T>);

impl<T> Default for Encoder<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Outgoing> tonic::codec::Encoder for Encoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.write(buffer)
    }
}

/// Decoder of [`Codec`].
#[derive(Debug)]
pub struct Decoder<U>(PhantomData<U>);

impl<U: Incoming> tonic::codec::Decoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let bytes = buffer.copy_to_bytes(buffer.remaining());
        U::read(bytes).map(Some)
    }
}
