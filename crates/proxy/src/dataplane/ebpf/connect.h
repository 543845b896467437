// Sockets of this node: the destination is chosen once, when a socket connects (or sends, without connecting), so that
// its packets need no translation at all.
//
// What must be dropped rather than refused is left alone here: its packets are dropped where they leave (`packet.h`).
#pragma once

#include "watch.h"

// From <errno.h>, which is not for programs without a C library.
#define CONNECTION_REFUSED 111
// A socket that sends without connecting stays with an endpoint for as long as it sends.
#define ASKED 1
#define GIVEN 0

enum outcome { UNTOUCHED, REWRITTEN, REFUSE };

// With `others` another endpoint could have been given.
inlined void remember(struct bpf_sock_addr *context, const struct endpoint *asked, const struct endpoint *given, int sending,
		      int others)
{
	struct socket_key key = {.at = *given, .asked = GIVEN};

	if (context->protocol == IPPROTO_TCP) {
		struct bpf_sock *socket = context->sk;
		struct peer *peer = socket ? socket_storage(&peers, socket, NULL, BPF_SK_STORAGE_GET_F_CREATE) : NULL;

		if (peer) {
			peer->asked = *asked;
			peer->given = *given;
			peer->actual = *given;
			peer->phase = CHOSEN;
			peer->others = others;
		}
		return;
	}
	key.cookie = socket_cookie(context);
	map_update(&sockets, &key, asked, BPF_ANY);
	if (sending) {
		key.at = *asked;
		key.asked = ASKED;
		map_update(&sockets, &key, given, BPF_ANY);
	}
}

// A socket that goes straight to an address it was once given is on its own.
inlined void forget(struct bpf_sock_addr *context, const struct endpoint *place)
{
	struct socket_key key = {.cookie = socket_cookie(context), .at = *place, .asked = GIVEN};

	if (context->protocol == IPPROTO_UDP)
		map_delete(&sockets, &key);
}

// A socket is closed.
SEC("cgroup/sock_release") int release(struct bpf_sock *socket)
{
	struct endpoint *held = socket_storage(&counted, socket, NULL, 0);

	if (held && held->port) {
		struct endpoint endpoint = *held;

		held->port = 0;
		add_load(&endpoint, socket->protocol, LOAD_OF_SOCKETS, -1);
	}
	return 1;
}

// `place` is what the socket asked for, and becomes where it is sent.
inlined enum outcome choose(struct bpf_sock_addr *context, struct endpoint *place, int sending)
{
	__u8 protocol = context->protocol == IPPROTO_UDP ? IPPROTO_UDP : IPPROTO_TCP;
	union address client = {};
	struct endpoint picked = {};
	struct frontend *frontend;
	struct node *node;

	if (context->protocol != IPPROTO_TCP && context->protocol != IPPROTO_UDP)
		return UNTOUCHED;
	frontend = find_frontend(&place->address, place->port, protocol);
	node = this_node();
	if (!frontend || !node) {
		forget(context, place);
		return UNTOUCHED;
	}
	// A pod is its network namespace. Its address is not chosen yet, and one day is another pod's.
	client.halves[0] = namespace_cookie(context);
	client.halves[1] = ~0ULL;
	if (frontend->flags & FIREWALL &&
	    (client.halves[0] != node->cookie || !(frontend->flags & NODE_ALLOWED)))
		return UNTOUCHED;
	if (!frontend->count) {
		// What is to be dropped is counted where it is.
		if (!(frontend->flags & REFUSED))
			return UNTOUCHED;
		note_rejected(&place->address, place->port, protocol);
		return REFUSE;
	}
	if (sending) {
		struct socket_key key = {.cookie = socket_cookie(context), .at = *place, .asked = ASKED};
		struct endpoint *held = map_lookup(&sockets, &key);

		if (held && is_member(frontend->id, SERVING, held)) {
			picked = *held;
			remember(context, place, &picked, 0, 0);
			*place = picked;
			return REWRITTEN;
		}
	}
	// A socket's connection stays on this node, and a port it does not have yet: its place in a table is random.
	struct choice choice = {
		.list = frontend->list,
		.count = frontend->count,
		.affinity_seconds = frontend->affinity_seconds,
		.flags = frontend->flags,
		.hash = random32(),
	};
	if (!pick(&choice, &client, protocol, &picked))
		return UNTOUCHED;
	if (choice.flags & LEAST_LOAD && !sending && context->sk)
		count_socket(context->sk, protocol, &picked);
	remember(context, place, &picked, sending, frontend->count > 1);
	if (protocol == IPPROTO_UDP && is_watched()) {
		struct contact_key key;

		name_contact(&key, place, &picked, IPPROTO_UDP);
		note_begun(&key, 0);
	}
	*place = picked;
	return REWRITTEN;
}

// Where the socket believes that an answer comes from.
inlined int believed(struct bpf_sock_addr *context, struct endpoint *place)
{
	struct socket_key key = {.at = *place, .asked = GIVEN};
	struct endpoint *asked;

	if (context->protocol == IPPROTO_TCP) {
		struct bpf_sock *socket = context->sk;
		struct peer *peer = socket ? socket_storage(&peers, socket, NULL, 0) : NULL;

		if (!peer || peer->given.port != place->port || !same_address(&peer->given.address, &place->address))
			return 0;
		*place = peer->asked;
		return 1;
	}
	key.cookie = socket_cookie(context);
	asked = map_lookup(&sockets, &key);
	if (!asked)
		return 0;
	*place = *asked;
	return 1;
}

inlined struct endpoint place4(struct bpf_sock_addr *context)
{
	struct endpoint place = {.port = context->user_port};

	set_ipv4(&place.address, context->user_ip4);
	return place;
}

inlined void place_at4(struct bpf_sock_addr *context, const struct endpoint *place)
{
	context->user_ip4 = place->address.words[3];
	context->user_port = place->port;
}

inlined struct endpoint place6(struct bpf_sock_addr *context)
{
	struct endpoint place = {.port = context->user_port};

	place.address.words[0] = context->user_ip6[0];
	place.address.words[1] = context->user_ip6[1];
	place.address.words[2] = context->user_ip6[2];
	place.address.words[3] = context->user_ip6[3];
	return place;
}

inlined void place_at6(struct bpf_sock_addr *context, const struct endpoint *place)
{
	context->user_ip6[0] = place->address.words[0];
	context->user_ip6[1] = place->address.words[1];
	context->user_ip6[2] = place->address.words[2];
	context->user_ip6[3] = place->address.words[3];
	context->user_port = place->port;
}

// The system call goes on if a program returns 1, and fails with the result set if it returns 0.
inlined int go4(struct bpf_sock_addr *context, int sending)
{
	struct endpoint place = place4(context);

	switch (choose(context, &place, sending)) {
	case REFUSE:
		set_result(-CONNECTION_REFUSED);
		return 0;
	case REWRITTEN:
		place_at4(context, &place);
	case UNTOUCHED:
		break;
	}
	return 1;
}

inlined int go6(struct bpf_sock_addr *context, int sending)
{
	struct endpoint place = place6(context);

	switch (choose(context, &place, sending)) {
	case REFUSE:
		set_result(-CONNECTION_REFUSED);
		return 0;
	case REWRITTEN:
		place_at6(context, &place);
	case UNTOUCHED:
		break;
	}
	return 1;
}

inlined int come4(struct bpf_sock_addr *context)
{
	struct endpoint place = place4(context);

	if (believed(context, &place))
		place_at4(context, &place);
	return 1;
}

inlined int come6(struct bpf_sock_addr *context)
{
	struct endpoint place = place6(context);

	if (believed(context, &place))
		place_at6(context, &place);
	return 1;
}

SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *context) { return go4(context, 0); }
SEC("cgroup/connect6") int connect6(struct bpf_sock_addr *context) { return go6(context, 0); }
SEC("cgroup/sendmsg4") int sendmsg4(struct bpf_sock_addr *context) { return go4(context, 1); }
SEC("cgroup/sendmsg6") int sendmsg6(struct bpf_sock_addr *context) { return go6(context, 1); }
SEC("cgroup/recvmsg4") int recvmsg4(struct bpf_sock_addr *context) { return come4(context); }
SEC("cgroup/recvmsg6") int recvmsg6(struct bpf_sock_addr *context) { return come6(context); }
SEC("cgroup/getpeername4") int getpeername4(struct bpf_sock_addr *context) { return come4(context); }
SEC("cgroup/getpeername6") int getpeername6(struct bpf_sock_addr *context) { return come6(context); }

// A connected UDP socket keeps its endpoint for as long as it lives, long after the endpoint has gone. It is handed back with
// an error (EPERM) when it next sends: whoever connects again gets another endpoint.
SEC("cgroup_skb/egress") int send(struct __sk_buff *skb)
{
	struct socket_key key = {.asked = GIVEN};
	struct frontend *frontend;
	struct endpoint *asked;
	__u32 transport;
	__be16 ports[2];

	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, 0, &header, sizeof(header)) || header.protocol != IPPROTO_UDP)
			return 1;
		set_ipv4(&key.at.address, header.daddr);
		transport = header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, 0, &header, sizeof(header)) || header.nexthdr != IPPROTO_UDP)
			return 1;
		__builtin_memcpy(&key.at.address, &header.daddr, 16);
		transport = sizeof(header);
	} else {
		return 1;
	}
	if (load_bytes(skb, transport, ports, sizeof(ports)))
		return 1;
	key.at.port = ports[1];
	key.cookie = socket_cookie(skb);
	asked = map_lookup(&sockets, &key);
	if (!asked)
		return 1;
	frontend = find_frontend(&asked->address, asked->port, IPPROTO_UDP);
	return frontend && is_member(frontend->id, SERVING, &key.at);
}
