//! What is only forwarded through the pod: the packets of a virtual machine that
//! hangs on one of its virtual interfaces (`-k`).
//!
//! This is the one place where packets are rewritten. Everywhere else the proxy's
//! socket is handed over, or the application's is pointed at the proxy. Here
//! neither will do: the client has no socket in this namespace, and the proxy's
//! socket cannot take a packet for a foreign address, because the kernel routes
//! before it looks for sockets, and answers from a foreign address only for
//! sockets that were opened to do so (`IP_TRANSPARENT`). So this does what
//! `REDIRECT` does: a packet for somebody else goes to the first address of the
//! interface that it came in through, to the proxy's port, and the answers seem to
//! come from whom was asked. Of two connections from one port to two hosts the
//! second goes to another port ([`other_port`]), where connection tracking would
//! change the client's.
//!
//! Nothing is kept for a connection but what its socket keeps: the accepted
//! socket has the original destination, by [`handshake`](crate::handshake). The
//! map `FORWARDED` stands in while there is no such socket: before it is accepted,
//! and when what answers is no full socket any longer (a reset, a connection in
//! TIME_WAIT). Whatever arrives for a connection that no socket knows writes the
//! entry again, so that losing one loses a packet at most.
//!
//! What cannot be redirected is dropped and counted, never forwarded. Let through
//! are the answers to those who have opened a connection to the machine, which
//! `SERVED` knows; the packets of connections that are older than the enrolment
//! are redirected, and so reset, as by the mesh's rules.

use shunt_abi::{
    Addr, Endpoint, ErrorCode, FlowKey, INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, Interface,
    PodSettings, ROUTE_LOCAL,
};
use shunt_decide::{Inbound, inbound};

use crate::{
    counters,
    ctx::{Frame, FullSocket, Socket},
    handshake::flow,
    lists::{self, PodLists},
    maps::{FORWARDED, LOOKING, ORIGINAL_DST, SERVED},
    packet::{Content, Packet},
    pods,
};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on as it is.
    Untouched,
    /// It goes on to the proxy, or comes from whom was asked.
    Redirected,
    /// It is dropped: it has to be redirected and cannot be.
    Dropped,
}

/// Where a packet comes in or goes out.
struct Crossing<'a> {
    settings: &'a PodSettings,
    interface: &'a Interface,
}

impl Crossing<'_> {
    /// `None` when the packet is none of our business.
    #[inline(always)]
    fn of(frame: Frame) -> Option<Self> {
        let settings = pods::settings(pods::here())?;
        let interface = lists::marked_interface(settings, frame.ifindex())?;
        (!frame.is_tagged()).then_some(Self {
            settings,
            interface,
        })
    }
}

/// Decides over a packet that comes in through a virtual interface.
#[inline(always)]
pub fn arrives(frame: Frame) -> Fate {
    let Some(Crossing {
        settings,
        interface,
    }) = Crossing::of(frame)
    else {
        return Fate::Untouched;
    };
    let mut packet = Packet::behind(frame, interface.link_header);
    let content = find(&mut packet);
    if content == Content::Other {
        return Fate::Untouched;
    }
    let to = &packet.destination.addr;
    if lists::route(pods::here(), to).is_some_and(|route| route.flags & ROUTE_LOCAL != 0) {
        // For the pod itself: `sk_lookup` decides.
        return Fate::Untouched;
    }
    let Some(port) = proxy_port(settings, interface, to) else {
        return Fate::Untouched;
    };
    if content == Content::Unreadable {
        return dropped(ErrorCode::ForwardUnreadable);
    }
    let own = own_address(interface, to);
    if own.is_unspecified() {
        return dropped(ErrorCode::ForwardNoAddress);
    }
    match redirect(&packet, Endpoint::new(own, port)) {
        Ok(fate) => fate,
        Err(error) => dropped(error),
    }
}

/// Looks for TCP in a packet.
///
/// A function with a frame of its own, as [`answers`], [`look_at`], [`send`] and
/// [`put_back`]: one is done when the next begins, and what headers, or the key of a
/// connection, take of the stack counts once. And who calls them has the packet in memory,
/// where it takes less of the stack than its words do one by one.
#[inline(never)]
fn find(packet: &mut Packet) -> Content {
    packet.find()
}

/// The port of the proxy that takes what comes in through the interface on its
/// way to `to`. The decision is counted by `sk_lookup`, which sees it next.
#[inline(always)]
fn proxy_port(settings: &PodSettings, interface: &Interface, to: &Addr) -> Option<u16> {
    let facts = Inbound {
        destination: *to,
        // Whatever the port, says the rule of virtual interfaces.
        port: 0,
        from_self: false,
        interface_excluded: interface.flags & INTERFACE_EXCLUDED != 0,
        interface_virtual: interface.flags & INTERFACE_VIRTUAL != 0,
    };
    if !facts.interface_virtual {
        return None;
    }
    let lists = PodLists {
        list_set: settings.list_set,
    };
    inbound(settings, &facts, &lists).verdict.port(settings)
}

/// Sends a packet to the proxy: to `server`, or to another port of its if that is taken.
#[inline(always)]
fn redirect(packet: &Packet, mut server: Endpoint) -> Result<Fate, ErrorCode> {
    if answers(packet) {
        return Ok(Fate::Untouched);
    }
    let fits = |place: Place| match place {
        Place::Known | Place::Published => true,
        Place::Anothers => false,
        // A packet in the middle is rather that of a connection there is.
        Place::Connection | Place::Free => packet.is_first(),
    };
    let mut place = look_at(packet, &server);
    if !fits(place) {
        let (first, first_is) = (server.port, place);
        server.port = other_port(first, &packet.destination);
        place = look_at(packet, &server);
        if !fits(place) && place != Place::Connection {
            if first_is == Place::Anothers {
                return Err(ErrorCode::ForwardCollision);
            }
            (server.port, place) = (first, first_is);
        }
    }
    send(packet, &server, place).map(|()| Fate::Redirected)
}

/// Whether a packet is one of a connection that somebody has opened to its sender.
#[inline(never)]
fn answers(packet: &Packet) -> bool {
    let served = flow_here(&packet.destination, &packet.source);
    if packet.is_first() {
        // Who opens a connection answers none, whatever was there before.
        let _ = SERVED.remove(&served);
        return false;
    }
    // SAFETY: the element is not looked into.
    unsafe { SERVED.get(&served) }.is_some()
}

/// Where else a connection can go when another one from the same port, to
/// somebody else, has the proxy's own port: to one that `asked` alone decides, so
/// that every packet finds it again. `sk_lookup` gives it to the proxy as well.
#[inline(always)]
fn other_port(first: u16, asked: &Endpoint) -> u16 {
    /// Spreads numbers that are close to each other (Knuth, 6.4).
    const SPREAD: u32 = 0x9e37_79b1;
    /// The ports below are those of the pod's own services.
    const LOWEST: u32 = 1024;
    let mut mixed = u32::from(asked.port);
    for word in asked.addr.words {
        mixed = (mixed ^ word).wrapping_mul(SPREAD);
        mixed ^= mixed >> 15;
    }
    let port = (LOWEST + mixed % (0x1_0000 - LOWEST)) as u16;
    if port == first { port ^ 1 } else { port }
}

/// What there is for a client at an address of the proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The socket of this very connection, which knows the original destination.
    Known,
    /// Its entry in `FORWARDED`.
    Published,
    /// Another connection.
    Anothers,
    /// A connection that nobody knows the original destination of: the entry is
    /// lost, or its socket is no full one any more.
    Connection,
    /// Nothing.
    Free,
}

/// What there is for the sender of a packet at `server`.
#[inline(never)]
fn look_at(packet: &Packet, server: &Endpoint) -> Place {
    let (client, asked) = (&packet.source, &packet.destination);
    let place = looking(client, || {
        packet
            .receiver(server, |socket| place_of(socket, asked))
            .unwrap_or(Place::Free)
    });
    if place == Place::Known || place == Place::Anothers {
        return place;
    }
    // SAFETY: nobody changes an element, see `answer`.
    match unsafe { FORWARDED.get(&flow_here(client, server)) } {
        Some(published) if same(published, asked) => Place::Published,
        Some(_) => Place::Anothers,
        None => place,
    }
}

/// Sends a packet to the proxy at `server`, and sees to it that the answer
/// finds the original destination: in the socket, or else in `FORWARDED`.
#[inline(never)]
fn send(packet: &Packet, server: &Endpoint, place: Place) -> Result<(), ErrorCode> {
    let key = flow_here(&packet.source, server);
    if packet.is_reset() {
        // It is not answered.
        let _ = FORWARDED.remove(&key);
    } else if place != Place::Known {
        FORWARDED
            .insert(&key, &packet.destination, 0)
            .map_err(|_full| ErrorCode::ForwardFailed)?;
    }
    packet
        .set_destination(server)
        .map_err(|_no_memory| ErrorCode::ForwardFailed)
}

/// Whose a socket is that was found for a packet to `asked`.
#[inline(always)]
fn place_of(socket: FullSocket, asked: &Endpoint) -> Place {
    if socket.is_listener() {
        return Place::Free;
    }
    match original(socket.socket()) {
        Some(kept) if same(&kept, asked) => Place::Known,
        Some(_) => Place::Anothers,
        None => Place::Connection,
    }
}

/// The key of a connection in this pod.
#[inline(always)]
fn flow_here(client: &Endpoint, server: &Endpoint) -> FlowKey {
    flow(pods::here(), client, server)
}

/// Looks for the socket of a client. Where there is no connection that runs
/// `sk_lookup`, which would take it for an arrival, decide and count.
#[inline(always)]
fn looking<R>(client: &Endpoint, look: impl FnOnce() -> R) -> R {
    let mark = LOOKING.get_ptr_mut(0);
    if let Some(mark) = mark {
        // SAFETY: the element of this processor, which this program alone writes.
        unsafe { *mark = *client };
    }
    let found = look();
    if let Some(mark) = mark {
        // SAFETY: as above. No client has port 0.
        unsafe { (*mark).port = 0 };
    }
    found
}

/// Whether this run of `sk_lookup` is but a look from here for a client's socket.
#[inline(always)]
pub fn is_look(client: &Endpoint) -> bool {
    LOOKING
        .get_ptr(0)
        // SAFETY: the element of this processor; it is read where it was written.
        .is_some_and(|mark| unsafe { same(&*mark, client) })
}

#[inline(always)]
const fn same(one: &Endpoint, other: &Endpoint) -> bool {
    one.port == other.port && one.addr.same(&other.addr)
}

/// The original destination that an accepted socket was given.
#[inline(always)]
fn original(socket: Socket) -> Option<Endpoint> {
    ORIGINAL_DST.get(socket)?.destination()
}

/// Gives a packet that goes out through a virtual interface the source that its
/// receiver knows.
#[inline(always)]
pub fn leaves(frame: Frame) -> Fate {
    let Some(Crossing { interface, .. }) = Crossing::of(frame) else {
        return Fate::Untouched;
    };
    let mut packet = Packet::behind(frame, interface.link_header);
    if packet.find() != Content::Tcp {
        // None of the proxy's: those are whole, and their headers known.
        return Fate::Untouched;
    }
    if !frame.has_sender() && packet.is_first() {
        return serve(&packet);
    }
    if !own_address(interface, &packet.source.addr).same(&packet.source.addr) {
        return Fate::Untouched;
    }
    match frame.sender().and_then(original) {
        Some(asked) => put_back(&packet, &asked),
        None => answer(&packet),
    }
}

/// An answer of the proxy's side that no full socket gives.
#[inline(always)]
fn answer(packet: &Packet) -> Fate {
    let key = flow_here(&packet.destination, &packet.source);
    // SAFETY: nobody changes an element: a connection's next packet brings
    // another, and what the kernel drops is what was used the longest ago.
    let Some(asked) = (unsafe { FORWARDED.get(&key) }) else {
        // A connection to the interface's address itself. If the entry was lost,
        // the receiver knows no such sender, and takes nothing from it.
        return Fate::Untouched;
    };
    let fate = put_back(packet, asked);
    if !packet.is_answer_to_first() {
        // The connection's next packet, if there is one, writes it again.
        let _ = FORWARDED.remove(&key);
    }
    fate
}

/// Makes an answer come from whom was asked.
#[inline(never)]
fn put_back(packet: &Packet, asked: &Endpoint) -> Fate {
    match packet.set_source(asked) {
        Ok(()) => Fate::Redirected,
        Err(_) => dropped(ErrorCode::ForwardFailed),
    }
}

/// Somebody opens a connection to what is behind the interface.
#[inline(always)]
fn serve(packet: &Packet) -> Fate {
    let key = flow_here(&packet.source, &packet.destination);
    match SERVED.insert(&key, 1, 0) {
        Ok(()) => Fate::Untouched,
        Err(_) => dropped(ErrorCode::ForwardFailed),
    }
}

/// The address of the interface that stands for `asked`.
#[inline(always)]
const fn own_address(interface: &Interface, asked: &Addr) -> Addr {
    if asked.is_v4() {
        interface.v4
    } else {
        interface.v6
    }
}

#[inline(always)]
fn dropped(error: ErrorCode) -> Fate {
    counters::failed(pods::here(), error);
    Fate::Dropped
}
