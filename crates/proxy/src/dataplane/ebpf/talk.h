// What becomes of the TCP sockets that `connect.h` sent to an endpoint. The kernel calls for every TCP socket of the node,
// so the first question is whether it is one of these.
//
// The destination of a socket is fixed when it connects. But the packets of a pod leave through `packet.h`: a SYN that was
// not answered is given a flow to another endpoint, just before the kernel repeats it.
#pragma once

#include "packet.h"

inlined struct peer *sent_peer(struct bpf_sock_ops *context)
{
	struct bpf_sock *socket = context->sk;
	struct peer *peer = socket ? socket_storage(&peers, socket, NULL, 0) : NULL;

	return peer && peer->phase == SENT ? peer : NULL;
}

// The verifier refuses a pointer into the context, which is what Clang makes of fields of which only some are read.
#define READ(field) (*(volatile __typeof__(field) *)&(field))

inlined struct endpoint own_place(struct bpf_sock_ops *context, const struct endpoint *peer)
{
	__be32 v4 = READ(context->local_ip4);
	__be32 v6[4] = {READ(context->local_ip6[0]), READ(context->local_ip6[1]), READ(context->local_ip6[2]),
			READ(context->local_ip6[3])};
	struct endpoint place = {.port = big16(READ(context->local_port))};

	if (!peer->address.halves[0] && peer->address.words[2] == __builtin_bswap32(0xffff)) {
		set_ipv4(&place.address, v4);
		return place;
	}
	__builtin_memcpy(&place.address, v6, sizeof(v6));
	return place;
}

// Packets of the node's own sockets go nowhere where their destination could still be rewritten.
inlined int is_of_pod(struct bpf_sock_ops *context)
{
	struct node *node = this_node();

	return node && namespace_cookie(context) != node->cookie;
}

inlined void note_attempt(struct bpf_sock_ops *context, const struct peer *peer)
{
	struct endpoint place = own_place(context, &peer->given);
	struct attempt *attempt = attempt_of(&place.address, place.port);

	if (!attempt)
		return;
	attempt->port = 0;
	attempt->client = place.address;
	attempt->asked = peer->asked;
	attempt->given = peer->given;
	attempt->at = peer->begun;
	attempt->outcome = OPEN;
	attempt->port = place.port;
}

// Its SYN is about to be sent.
inlined void begin(struct bpf_sock_ops *context)
{
	int flags = context->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG;
	struct bpf_sock *socket = context->sk;
	struct peer *peer = socket ? socket_storage(&peers, socket, NULL, 0) : NULL;
	struct contact_key key;

	// One that has tried somebody else since is on its own.
	if (!peer || peer->phase != CHOSEN || (__u16)__builtin_bswap32(context->remote_port) != big16(peer->given.port))
		return;
	peer->phase = SENT;
	peer->begun = now_ns();
	name_contact(&key, &peer->asked, &peer->given, IPPROTO_TCP);
	note_begun(&key, peer->others ? SOCKET | OTHERS : SOCKET);
	if (peer->others && holds_refusals() && is_of_pod(context)) {
		note_attempt(context, peer);
		flags |= BPF_SOCK_OPS_RTO_CB_FLAG;
	}
	set_callbacks(context, flags);
}

// Its SYN was not answered, and is about to be repeated: it goes to another endpoint, where there is one.
inlined void move(struct bpf_sock_ops *context)
{
	struct peer *peer = sent_peer(context);
	struct endpoint picked = {}, asked, tried, place;
	union address client = {};
	struct frontend *frontend;
	struct contact_key key;
	struct contact *contact;
	struct attempt *attempt;
	struct packet packet = {};

	if (!peer || !holds_refusals())
		return;
	asked = peer->asked;
	tried = peer->actual;
	frontend = find_frontend(&asked.address, asked.port, IPPROTO_TCP);
	if (!frontend || !frontend->count)
		return;
	client.halves[0] = namespace_cookie(context);
	client.halves[1] = ~0ULL;
		place = own_place(context, &peer->given);
	packet.key.source = place.address;
	packet.key.source_port = place.port;
	packet.key.destination = peer->given.address;
	packet.key.destination_port = peer->given.port;
	packet.key.protocol = IPPROTO_TCP;
	for (int tries = 0; tries < OTHER_PICKS; tries++) {
		forget_client(frontend->list, &client);
		if (!pick(frontend->list, frontend->count, frontend->affinity_seconds, &client, &picked))
			return;
		// A pod that would reach itself needs more than this.
		if (!same_address(&picked.address, &packet.key.source) &&
		    (picked.port != tried.port || !same_address(&picked.address, &tried.address)))
			break;
	}
	if (same_address(&picked.address, &packet.key.source) ||
	    (picked.port == tried.port && same_address(&picked.address, &tried.address)))
		return;
	if (!start_flow(&packet, &picked, frontend->id, MOVED))
		return;
	attempt = attempt_of(&place.address, place.port);
	if (attempt && attempt->port == place.port)
		attempt->outcome = GONE_ELSEWHERE;
	name_contact(&key, &asked, &tried, IPPROTO_TCP);
	contact = map_lookup(&contacts, &key);
	if (contact) {
		// A refusal that was held back is counted already.
		if (contact->asked_at)
			add(&contact->retried, 1);
		if (contact->open)
			add(&contact->open, -1);
	}
	peer->actual = picked;
	name_contact(&key, &asked, &picked, IPPROTO_TCP);
	note_begun(&key, SOCKET | OTHERS);
}

inlined void answer(struct bpf_sock_ops *context)
{
	struct peer *peer = sent_peer(context);
	struct contact_key key;

	if (!peer)
		return;
	name_contact(&key, &peer->asked, &peer->actual, IPPROTO_TCP);
	note_answered(&key, peer->begun);
}

inlined void end(struct bpf_sock_ops *context, __u32 before)
{
	struct peer *peer = sent_peer(context);
	__u64 sent = context->bytes_acked, received = context->bytes_received;
	struct contact_key key;
	struct contact *contact;

	if (!peer)
		return;
	peer->phase = ENDED;
	name_contact(&key, &peer->asked, &peer->actual, IPPROTO_TCP);
	contact = map_lookup(&contacts, &key);
	if (!contact)
		return;
	if (contact->open)
		add(&contact->open, -1);
	if (before == BPF_TCP_SYN_SENT) {
		// Otherwise nobody answered, and the client gave up; or an ICMP error ended it, which cannot be told apart here.
		if (context->segs_in)
			note_refused(&key, 0);
		return;
	}
	// SYN and FIN are counted as a byte each.
	if (before == BPF_TCP_LAST_ACK || before == BPF_TCP_FIN_WAIT2 || before == BPF_TCP_TIME_WAIT) {
		sent -= sent > 1 ? 2 : sent;
		received -= received > 0;
	} else {
		add(&contact->resets, 1);
		sent -= sent > 0;
	}
	add(&contact->sent, sent);
	add(&contact->received, received);
}

SEC("sockops") int talk(struct bpf_sock_ops *context)
{
	struct settings *held;

	switch (context->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (is_watched())
			begin(context);
		break;
	case BPF_SOCK_OPS_TIMEOUT_INIT:
		held = wanted();
		if (held && held->first_timeout && sent_peer(context))
			context->reply = held->first_timeout;
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		if (is_watched())
			answer(context);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		if (context->state == BPF_TCP_SYN_SENT)
			move(context);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (context->args[1] == BPF_TCP_CLOSE)
			end(context, context->args[0]);
		break;
	}
	return 1;
}
