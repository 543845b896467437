// Direct server return: a packet from outside goes to an endpoint on another node with its client's address, and that node
// answers the client itself, as the address that the client asked for. What opens a flow carries this address along: it
// travels inside a second IP header (RFC 2003, RFC 2473) whose destination is the endpoint, so that the network of pods
// leads it there, and whose identification (IPv4) or flow label (IPv6) is the endpoint's port: a packet that must not be
// fragmented needs none. All other packets go plainly translated.
#pragma once

#include "refusal.h"

#define HOPS 64

inlined __u32 capsule_size(int is_ipv6)
{
	return is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
}

inlined int has_room(const struct packet *packet, const struct node *node)
{
	return packet->length + capsule_size(packet->is_ipv6) <= node->mtu;
}

inlined int is_taker(const union address *address)
{
	return map_lookup(&takers, address) != NULL;
}

// Whether a new flow may be answered past this node.
inlined int goes_past(const struct packet *packet, const struct node *node, __u32 id, const struct endpoint *endpoint)
{
	const union address *own = &node->addresses[packet->is_ipv6 ? 1 : 0];

	// A node that is a client itself would refuse its own address from elsewhere.
	return (own->halves[0] || own->halves[1]) && has_room(packet, node) && is_member(id, TAKEN_THERE, endpoint) &&
	       !is_taker(&packet->key.source);
}

inlined int is_still_taken(const struct flow *flow)
{
	return is_member(flow->id, TAKEN_THERE, &flow->to);
}

// A client's acknowledgement is all that is seen here of its endpoint's answer.
inlined void note_acknowledgement(const struct packet *packet, struct flow *flow, __u64 begun)
{
	struct endpoint asked = {.address = packet->key.destination, .port = packet->key.destination_port};
	struct endpoint endpoint = flow->to;
	struct contact_key contact;

	if (flow->flags & ANSWERED || (packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) != TCP_ACK)
		return;
	flow->flags |= ANSWERED;
	if (contact_in(&contact, &asked, &endpoint, IPPROTO_TCP))
		note_answered(&contact, begun);
}

// Puts the packet into a second header, to the same endpoint.
separate int enclose(struct __sk_buff *skb, const struct packet *packet, const struct endpoint *asked)
{
	struct node *node = this_node();
	struct packet inner;
	struct endpoint to;
	__u32 length;

	if (!packet || !asked || !node)
		return TC_ACT_SHOT;
	inner = *packet;
	to = *asked;
	length = inner.length;
	if (rewrite(skb, &inner, &to, 0) != TC_ACT_OK)
		return TC_ACT_SHOT;
	if (inner.is_ipv6) {
		struct ipv6hdr header = {.version = 6, .nexthdr = IPPROTO_IPV6, .hop_limit = HOPS};

		header.payload_len = big16(length);
		__builtin_memcpy(&header.flow_lbl[1], &inner.key.destination_port, 2);
		__builtin_memcpy(&header.saddr, &node->addresses[1], 16);
		__builtin_memcpy(&header.daddr, &inner.key.destination, 16);
		if (adjust_room(skb, sizeof(header), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6) ||
		    store_bytes(skb, ETH_HLEN, &header, sizeof(header), 0))
			return TC_ACT_SHOT;
	} else {
		struct iphdr header = {.version = 4, .ihl = 5, .ttl = HOPS, .protocol = IPPROTO_IPIP};
		__u64 sum;

		header.tot_len = big16(length + sizeof(header));
		header.id = inner.key.destination_port;
		header.frag_off = big16(0x4000);
		header.saddr = node->addresses[0].words[3];
		header.daddr = inner.key.destination.words[3];
		sum = checksum_difference(NULL, 0, (__be32 *)&header, sizeof(header), 0);
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		header.check = ~sum;
		if (adjust_room(skb, sizeof(header), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4) ||
		    store_bytes(skb, ETH_HLEN, &header, sizeof(header), 0))
			return TC_ACT_SHOT;
	}
	return TC_ACT_OK;
}

// Connection tracking, which never sees an answer, would find a packet in the middle of such a flow invalid, and a firewall
// may drop what is so: it goes straight to the device that the first one left through.
inlined int go_past(__u32 device)
{
	return redirect_neighbour(device, NULL, 0, 0);
}

// A packet leaves to an endpoint whose node answers it.
separate int send_past(struct __sk_buff *skb, const struct packet *packet, const struct flow *opens)
{
	struct flow_key key = {};
	struct endpoint asked;
	struct node *node = this_node();
	struct flow *flow;

	if (!packet || !opens)
		return TC_ACT_OK;
	if (packet->key.protocol == IPPROTO_TCP && !is_first_syn(packet))
		return TC_ACT_OK;
	// A UDP packet that is too large goes plainly: its flow was opened by a smaller one. Without a node this mode has ended,
	// and what it opened goes on.
	if (!node || !has_room(packet, node))
		return TC_ACT_OK;
	asked = opens->to;
	key.protocol = packet->key.protocol;
	key.source = packet->key.source;
	key.source_port = packet->key.source_port;
	key.destination = asked.address;
	key.destination_port = asked.port;
	flow = map_lookup(&flows, &key);
	if (flow)
		flow->to.device = skb->ifindex;
	return enclose(skb, packet, &asked);
}

// Whether a client may ask an endpoint of this node for this.
separate int is_taken_here(const struct packet *inner, const struct endpoint *endpoint)
{
	struct source_key source = {.prefix_length = 32 + 128};
	struct frontend *frontend;

	if (!inner || !endpoint)
		return 0;
	// A node port of another node is no frontend here.
	if (is_taker(&inner->key.destination))
		return is_member((__u32)big16(inner->key.destination_port) << 8 | inner->key.protocol, TAKEN_BY_PORT, endpoint);
	frontend = find_frontend(&inner->key.destination, inner->key.destination_port, inner->key.protocol);
	if (!frontend)
		return 0;
	source.id = frontend->id;
	set_address(source.address, &inner->key.source);
	if (frontend->flags & FIREWALL && !map_lookup(&sources, &source))
		return 0;
	return is_member(frontend->id, TAKEN_HERE, endpoint);
}

// How answers to this client are translated back.
separate int start_answer(const struct packet *inner, const struct endpoint *endpoint)
{
	struct flow flow = {.flags = ANSWER | ANSWERED, .seen = now_ns()};
	struct flow_key key = {.leaving = 1};
	struct flow *held;

	if (!inner || !endpoint)
		return 0;
	key.protocol = inner->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = inner->key.source;
	key.destination_port = inner->key.source_port;
	flow.to.address = inner->key.destination;
	flow.to.port = inner->key.destination_port;
	held = map_lookup(&flows, &key);
	// What goes on keeps its count.
	if (held && is_same(&held->to, &flow.to) && !(held->flags & CLOSED)) {
		held->seen = flow.seen;
		return 1;
	}
	return !map_update(&flows, &key, &flow, BPF_ANY);
}

// A packet that another node has enclosed: taken out, it goes to its endpoint. Whatever else has two headers is left alone.
// The caller's stack holds both packet and endpoint: there is not much of it.
separate int open_capsule(struct __sk_buff *skb, struct packet *packet, struct endpoint *endpoint)
{
	union address sender = {};
	__u32 size;

	if (!packet || !endpoint)
		return TC_ACT_OK;
	size = capsule_size(packet->is_ipv6);
	sender = packet->key.source;
	endpoint->address = packet->key.destination;
	if (load_bytes(skb, ETH_HLEN + (packet->is_ipv6 ? offsetof(struct ipv6hdr, flow_lbl) + 1 : offsetof(struct iphdr, id)),
		       &endpoint->port, 2))
		return TC_ACT_OK;
	// As nodes write it: without options.
	if (packet->transport != ETH_HLEN + size || !this_node() || !parse_at(skb, packet, 0, packet->transport) ||
	    !is_taken_here(packet, endpoint))
		return TC_ACT_OK;
	// Only nodes may say whom a client asked for.
	if (!is_taker(&sender))
		return TC_ACT_SHOT;
	if (is_first_syn(packet) && note_straight(&endpoint->address, endpoint->port))
		return TC_ACT_SHOT;
	if (!start_answer(packet, endpoint) || adjust_room(skb, -(__s32)size, BPF_ADJ_ROOM_MAC, 0))
		return TC_ACT_SHOT;
	packet->transport -= size;
	return rewrite(skb, packet, endpoint, 0);
}
