//! One connection: opening it, ending it whatever the broker does, and what its errors mean.

use super::{RabbitMq, short};
use crate::broker::{BrokerError, void_exchange};
use amq_protocol::protocol::AMQPSoftError;
use futures_util::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use lapin::options::ExchangeDeclareOptions;
use lapin::tcp::{AsyncTcpStream, TLSConfig};
use lapin::types::parsing::parse_field_table;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use std::future::Future;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpSocket;

/// How long an orderly close may take: lapin's hangs for as long as the broker blocks the connection.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// A RabbitMQ greeting is about 500 bytes; more than this is no greeting.
const GREETING_LIMIT_BYTES: usize = 64 * 1024;

/// Bytes both ways, with TLS or without.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection of lapin's with a handle to its socket: lapin ends a connection only by talking to the broker, and a
/// blocked or frozen broker does not answer, while what lapin has queued would still be sent much later.
pub(super) struct Session {
    connection: Option<Connection>,
    socket: Socket,
}

#[derive(Clone, Default)]
struct Socket(Arc<OnceLock<std::net::TcpStream>>);

impl Socket {
    fn keep(&self, stream: &impl AsFd) {
        if let Ok(fd) = stream.as_fd().try_clone_to_owned() {
            let _ = self.0.set(fd.into());
        }
    }

    fn cut(&self) {
        if let Some(socket) = self.0.get() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Session {
    /// Connects and logs in. Dropping the future ends the attempt and its thread.
    pub(super) async fn open(broker: &RabbitMq) -> Result<Self, BrokerError> {
        let runtime = lapin::runtime::default_runtime().expect("lapin is built with its tokio runtime");
        let properties =
            ConnectionProperties::default().with_connection_name(broker.options.connection_name.as_str().into());
        let mut session = Self { connection: None, socket: Socket::default() };
        let socket = session.socket.clone();
        let reactor = runtime.clone();
        let connect = async move |uri: AMQPUri, _| {
            let address = (uri.authority.host.clone(), uri.authority.port);
            let stream = AsyncTcpStream::connect(&reactor, reactor.to_socket_addrs(address)).await?;
            if let AsyncTcpStream::Plain(plain) = &stream {
                socket.keep(plain.get_ref());
            }
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => Ok(stream.into_tls(&uri.authority.host, TLSConfig::default()).await?),
            }
        };
        let connection = Connection::connector(broker.uri.clone(), runtime, connect, properties)
            .await
            .map_err(|error| refused(broker, &error))?;
        session.connection = Some(connection);
        Ok(session)
    }

    /// The connection, which is there for as long as the session is.
    pub(super) fn connection(&self) -> &Connection {
        self.connection.as_ref().expect("a session is handed out connected")
    }

    /// Ends the connection at once: nothing that is still queued may be sent any more.
    pub(super) fn cut(&self) {
        self.socket.cut();
    }

    /// Closes in order, and cuts when the broker takes too long to answer.
    pub(super) async fn close(&mut self) {
        let close = self.connection().close(200, ShortString::from("closed"));
        if !matches!(tokio::time::timeout(CLOSE_LIMIT, close).await, Ok(Ok(()))) {
            self.cut();
        }
    }
}

impl Drop for Session {
    /// lapin says goodbye in the background; the socket is cut if that gets no answer, or at once when no
    /// connection came about.
    fn drop(&mut self) {
        let socket = self.socket.clone();
        match (self.connection.take(), tokio::runtime::Handle::try_current()) {
            (Some(_connection), Ok(runtime)) => {
                runtime.spawn(async move {
                    tokio::time::sleep(CLOSE_LIMIT).await;
                    socket.cut();
                });
            }
            _ => socket.cut(),
        }
    }
}

/// Bounds what opens a session by the broker's `connect_timeout`.
pub(super) async fn in_time<T>(
    broker: &RabbitMq,
    open: impl Future<Output = Result<T, BrokerError>>,
) -> Result<T, BrokerError> {
    let limit = broker.options.connect_timeout;
    match tokio::time::timeout(limit, open).await {
        Ok(result) => result,
        Err(_) => Err(BrokerError::TimedOut { what: "the attempt to connect", limit }),
    }
}

/// Declares the durable topic exchange and the one for void notices, or finds them as they should be.
pub(super) async fn declare_exchanges(broker: &RabbitMq, channel: &Channel, exchange: &str) -> Result<(), BrokerError> {
    declare_exchange(broker, channel, exchange, ExchangeKind::Topic).await?;
    declare_exchange(broker, channel, &void_exchange(exchange), ExchangeKind::Fanout).await
}

/// Declares a durable exchange, or finds it as it should be.
pub(super) async fn declare_exchange(
    broker: &RabbitMq,
    channel: &Channel,
    name: &str,
    kind: ExchangeKind,
) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let mend = exchange_mend(if kind == ExchangeKind::Fanout { "fanout" } else { "topic" });
    let declared = channel.exchange_declare(short("exchange", name)?, kind, options, FieldTable::default()).await;
    declared.map_err(|error| topology(broker, "exchange", name, &mend, &error))
}

/// What to do about an exchange that exists otherwise.
pub(super) fn exchange_mend(kind: &str) -> String {
    format!("delete it, or declare it as a durable {kind} exchange without arguments")
}

/// What a refused declaration means: the resource is otherwise, or we may not touch it.
pub(super) fn topology(
    broker: &RabbitMq,
    kind: &'static str,
    name: &str,
    mend: &str,
    error: &lapin::Error,
) -> BrokerError {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => {
            refused_declaration(broker, kind, name, mend, protocol.get_id(), protocol.get_message().as_str())
        }
        _ => lost(error),
    }
}

/// The same, by the broker's code and words.
pub(super) fn refused_declaration(
    broker: &RabbitMq,
    kind: &'static str,
    name: &str,
    mend: &str,
    code: u16,
    text: &str,
) -> BrokerError {
    match code {
        405 | 406 => BrokerError::Topology {
            kind,
            name: name.to_owned(),
            reason: format!("exists with other arguments or owners ({text}): {mend}"),
        },
        403 => BrokerError::AccessRefused {
            address: broker.address(),
            reason: format!(
                "{text}; grant it: rabbitmqctl set_permissions -p {} {} '.*' '.*' '.*'",
                broker.uri.vhost, broker.uri.authority.userinfo.username
            ),
        },
        code => closed(code, text),
    }
}

/// What an error on an open session means.
pub(super) fn lost(error: &lapin::Error) -> BrokerError {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => closed(protocol.get_id(), protocol.get_message().as_str()),
        _ => BrokerError::ConnectionLost(error.to_string()),
    }
}

/// What the broker's reason for closing a channel or a connection means: soft errors of AMQP concern a channel alone.
pub(super) fn closed(code: u16, text: &str) -> BrokerError {
    match AMQPSoftError::from_id(code) {
        Some(_) => BrokerError::ChannelClosed { code, text: text.to_owned() },
        None => BrokerError::ConnectionLost(format!("{code} {text}")),
    }
}

/// Why no connection came about.
fn refused(broker: &RabbitMq, error: &lapin::Error) -> BrokerError {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => refused_login(broker, protocol.get_id(), protocol.get_message().as_str()),
        ErrorKind::AuthProviderError(text) => {
            BrokerError::AccessRefused { address: broker.address(), reason: text.clone() }
        }
        _ => BrokerError::Unreachable { address: broker.address(), reason: error.to_string() },
    }
}

/// The same, by the broker's code and words.
pub(super) fn refused_login(broker: &RabbitMq, code: u16, text: &str) -> BrokerError {
    let address = broker.address();
    let (user, vhost) = (&broker.uri.authority.userinfo.username, &broker.uri.vhost);
    let no_vhost = text.contains("vhost") && (text.contains("not found") || text.contains("refused"));
    match code {
        // One of the others will end.
        530 if text.contains("connection limit") => {
            BrokerError::Unreachable { address, reason: format!("{code} {text}") }
        }
        403 => {
            BrokerError::AccessRefused { address, reason: format!("{text} (user \"{user}\": check name and password)") }
        }
        404 | 530 if no_vhost => BrokerError::AccessRefused {
            address,
            reason: format!(
                "{text}; create it: rabbitmqctl add_vhost {vhost}, and let the user in: \
                 rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'"
            ),
        },
        404 | 530 => BrokerError::AccessRefused { address, reason: text.to_owned() },
        code => BrokerError::Unreachable { address, reason: format!("{code} {text}") },
    }
}

/// Reads the version out of the greeting (AMQP 0-9-1, `connection.start`), which lapin does not show.
pub(super) async fn server_version(broker: &RabbitMq) -> Result<(u32, u32), BrokerError> {
    let unreachable = |reason: String| BrokerError::Unreachable { address: broker.address(), reason };
    let greeting =
        in_time(broker, async { greeting(&broker.uri).await.map_err(|e| unreachable(e.to_string())) }).await?;
    // Class and method, 10 and 10, then the protocol's version; the server's properties follow.
    let properties = greeting.get(6..).and_then(|table| parse_field_table(table).ok());
    let version = match properties.as_ref().and_then(|(_, table)| table.inner().get("version")) {
        Some(AMQPValue::LongString(version)) => version.to_string(),
        _ => return Err(unreachable("it gave no version in its greeting".to_owned())),
    };
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(unreachable(format!("its version \"{version}\" is no number"))),
    }
}

/// A connected stream, over TLS if the URL asks for it, and its socket.
pub(super) async fn dial(uri: &AMQPUri) -> std::io::Result<(Box<dyn Stream>, TcpSocket)> {
    let runtime = lapin::runtime::default_runtime().expect("lapin is built with its tokio runtime");
    let address = (uri.authority.host.clone(), uri.authority.port);
    let stream = AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(address)).await?;
    let AsyncTcpStream::Plain(plain) = &stream else {
        return Err(std::io::Error::other("a stream without TLS is one with it"));
    };
    plain.get_ref().set_nodelay(true)?;
    let socket = TcpSocket::from_std_stream(plain.get_ref().as_fd().try_clone_to_owned()?.into());
    Ok(match uri.scheme {
        AMQPScheme::AMQP => (Box::new(stream), socket),
        AMQPScheme::AMQPS => (Box::new(stream.into_tls(&uri.authority.host, TLSConfig::default()).await?), socket),
    })
}

/// The payload of the broker's first frame.
async fn greeting(uri: &AMQPUri) -> std::io::Result<Vec<u8>> {
    let (mut stream, _) = dial(uri).await?;
    stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
    stream.flush().await?;
    // A frame opens with its type, channel and size: 1, 2 and 4 bytes.
    let mut head = [0; 7];
    stream.read_exact(&mut head).await?;
    let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
    if head[0] != 1 || size > GREETING_LIMIT_BYTES {
        return Err(std::io::Error::other("it does not speak AMQP 0-9-1"));
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload).await?;
    Ok(payload)
}
