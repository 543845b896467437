// Packets that no socket of this node was asked about: those from outside, and those of pods whose sockets the programs in
// `connect.h` did not see. Like netfilter's NAT, in four places: the destination is rewritten where a packet arrives, the
// source where it leaves, in both directions; between them lies the node's own routing and firewall.
#pragma once

#include "pick.h"

#define TCP_FLAGS 13
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
// Known to kernels since 6.16; older ones refuse it.
#define CHECKSUM_OF_IPV6 (1ULL << 7)
#define INVALID 22
// Ports for masquerading: below those that sockets of the node take by themselves, and below node ports.
#define FIRST_PORT 1024
#define PORTS 28976
#define PORT_TRIES 32
// How often a SYN that was not answered is drawn again until it goes to another endpoint.
#define OTHER_PICKS 4
// A UDP client that was silent for so long is a new one; a SYN that comes later than this is no repetition.
#define UDP_IDLE (120 * SECOND)
#define SYN_REPEATS (5 * SECOND)

struct packet {
	struct flow_key key;
	__u32 transport;
	__u8 is_ipv6;
	__u8 tcp_flags;
};

// Whether this is a packet that Services are about.
inlined int parse(struct __sk_buff *skb, struct packet *packet, __u8 leaving)
{
	__be16 ports[2];

	__builtin_memset(packet, 0, sizeof(*packet));
	packet->key.leaving = leaving;
	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)))
			return 0;
		// Ports are in the first fragment only: fragments are not translated at all.
		if (header.ihl < 5 || header.frag_off & big16(0x3fff))
			return 0;
		set_ipv4(&packet->key.source, header.saddr);
		set_ipv4(&packet->key.destination, header.daddr);
		packet->key.protocol = header.protocol;
		packet->transport = ETH_HLEN + header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&packet->key.source, &header.saddr, 16);
		__builtin_memcpy(&packet->key.destination, &header.daddr, 16);
		packet->key.protocol = header.nexthdr;
		packet->transport = ETH_HLEN + sizeof(header);
		packet->is_ipv6 = 1;
	} else {
		return 0;
	}
	if (packet->key.protocol != IPPROTO_TCP && packet->key.protocol != IPPROTO_UDP)
		return 0;
	if (load_bytes(skb, packet->transport, ports, sizeof(ports)))
		return 0;
	packet->key.source_port = ports[0];
	packet->key.destination_port = ports[1];
	if (packet->key.protocol == IPPROTO_TCP)
		load_bytes(skb, packet->transport + TCP_FLAGS, &packet->tcp_flags, 1);
	return 1;
}

inlined int is_first_syn(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

// Writes a new destination or source, address and port.
separate int rewrite(struct __sk_buff *skb, const struct packet *packet, const struct endpoint *to, int source)
{
	union address from, address;
	__u32 transport, checksum;
	__be16 from_port, port;
	__u64 flags = 0;

	if (!packet || !to)
		return TC_ACT_SHOT;
	from = source ? packet->key.source : packet->key.destination;
	from_port = source ? packet->key.source_port : packet->key.destination_port;
	address = to->address;
	port = to->port;
	transport = packet->transport;
	checksum = transport + 16;
	if (packet->key.protocol == IPPROTO_UDP) {
		checksum = transport + 6;
		// A UDP packet without a checksum stays without.
		flags = BPF_F_MARK_MANGLED_0;
	}
	if (packet->is_ipv6) {
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		if (replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | CHECKSUM_OF_IPV6 | flags) == -INVALID)
			replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | flags);
		store_bytes(skb, ETH_HLEN + (source ? 8 : 24), &address, 16, 0);
	} else {
		replace_l4_checksum(skb, checksum, from.words[3], address.words[3], BPF_F_PSEUDO_HDR | flags | 4);
		replace_l3_checksum(skb, ETH_HLEN + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	replace_l4_checksum(skb, checksum, from_port, port, flags | 2);
	if (store_bytes(skb, transport + (source ? 0 : 2), &port, 2, 0))
		return TC_ACT_SHOT;
	return TC_ACT_OK;
}

#define ICMP_CHECKSUM 2
#define ICMP_HEADER 8

// An ICMP error and the packet it is about. `key` is that packet's answer, which has the same flow.
struct error {
	struct flow_key key;
	union address source;
	union address destination;
	__u32 icmp;
	__u32 inner;
	__u32 inner_transport;
	__u8 is_ipv6;
};

// Whether this is an error about a packet that Services may be about.
inlined int parse_error(struct __sk_buff *skb, struct error *error, __u8 leaving)
{
	__be16 ports[2];
	__u8 type;

	__builtin_memset(error, 0, sizeof(*error));
	error->key.leaving = leaving;
	if (skb->protocol == big16(ETH_P_IP)) {
		struct iphdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)) || header.protocol != IPPROTO_ICMP)
			return 0;
		if (header.ihl < 5 || header.frag_off & big16(0x3fff))
			return 0;
		set_ipv4(&error->source, header.saddr);
		set_ipv4(&error->destination, header.daddr);
		error->icmp = ETH_HLEN + header.ihl * 4;
		error->inner = error->icmp + ICMP_HEADER;
		// Unreachable, time exceeded, bad parameter.
		if (load_bytes(skb, error->icmp, &type, 1) || (type != 3 && type != 11 && type != 12))
			return 0;
		if (load_bytes(skb, error->inner, &header, sizeof(header)) || header.ihl < 5)
			return 0;
		set_ipv4(&error->key.destination, header.saddr);
		set_ipv4(&error->key.source, header.daddr);
		error->key.protocol = header.protocol;
		error->inner_transport = error->inner + header.ihl * 4;
	} else if (skb->protocol == big16(ETH_P_IPV6)) {
		struct ipv6hdr header;

		if (load_bytes(skb, ETH_HLEN, &header, sizeof(header)) || header.nexthdr != IPPROTO_ICMPV6)
			return 0;
		__builtin_memcpy(&error->source, &header.saddr, 16);
		__builtin_memcpy(&error->destination, &header.daddr, 16);
		error->icmp = ETH_HLEN + sizeof(header);
		error->inner = error->icmp + ICMP_HEADER;
		// Unreachable, too big, time exceeded, bad parameter.
		if (load_bytes(skb, error->icmp, &type, 1) || type < 1 || type > 4)
			return 0;
		if (load_bytes(skb, error->inner, &header, sizeof(header)))
			return 0;
		__builtin_memcpy(&error->key.destination, &header.saddr, 16);
		__builtin_memcpy(&error->key.source, &header.daddr, 16);
		error->key.protocol = header.nexthdr;
		error->inner_transport = error->inner + sizeof(header);
		error->is_ipv6 = 1;
	} else {
		return 0;
	}
	if (error->key.protocol != IPPROTO_TCP && error->key.protocol != IPPROTO_UDP)
		return 0;
	if (load_bytes(skb, error->inner_transport, ports, sizeof(ports)))
		return 0;
	error->key.destination_port = ports[0];
	error->key.source_port = ports[1];
	return 1;
}

// Writes an address of the error itself. Its checksum covers addresses in IPv6 only.
separate int rewrite_outer(struct __sk_buff *skb, const struct error *error, const union address *to, int source)
{
	union address from, address;

	if (!error || !to)
		return 0;
	from = source ? error->source : error->destination;
	address = *to;
	if (error->is_ipv6) {
		__u32 checksum = error->icmp + ICMP_CHECKSUM;
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		if (replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR | CHECKSUM_OF_IPV6) == -INVALID)
			replace_l4_checksum(skb, checksum, 0, difference, BPF_F_PSEUDO_HDR);
		store_bytes(skb, ETH_HLEN + (source ? 8 : 24), &address, 16, 0);
	} else {
		replace_l3_checksum(skb, ETH_HLEN + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, ETH_HLEN + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	return 0;
}

// Writes an end of the packet that the error is about. Its own transport checksum may be cut off, and nobody looks at it.
separate int rewrite_inner(struct __sk_buff *skb, const struct error *error, const struct endpoint *to, int source)
{
	union address from, address;
	__be16 from_port, port;
	__u32 checksum;

	if (!error || !to)
		return 0;
	// The key is the answer's: the other way round.
	from = source ? error->key.destination : error->key.source;
	from_port = source ? error->key.destination_port : error->key.source_port;
	address = to->address;
	port = to->port;
	checksum = error->icmp + ICMP_CHECKSUM;
	if (error->is_ipv6) {
		long difference = checksum_difference(&from, 16, &address, 16, 0);

		replace_l4_checksum(skb, checksum, 0, difference, 0);
		store_bytes(skb, error->inner + (source ? 8 : 24), &address, 16, 0);
	} else {
		// The inner header's checksum makes up for its address: the outer one does not change.
		replace_l3_checksum(skb, error->inner + 10, from.words[3], address.words[3], 4);
		store_bytes(skb, error->inner + (source ? 12 : 16), &address.words[3], 4, 0);
	}
	replace_l4_checksum(skb, checksum, from_port, port, 2);
	store_bytes(skb, error->inner_transport + (source ? 0 : 2), &port, 2, 0);
	return 0;
}

// An error is translated like the answer that it stands for.
separate int translate_error(struct __sk_buff *skb, int leaving)
{
	struct endpoint to;
	struct error error;
	struct flow *flow;

	if (!parse_error(skb, &error, leaving ? 1 : 0))
		return TC_ACT_OK;
	flow = map_lookup(&flows, &error.key);
	if (!flow)
		return TC_ACT_OK;
	to = flow->to;
	if (leaving) {
		rewrite_inner(skb, &error, &to, 0);
		// From the endpoint itself, not from a router on the way.
		if (same_address(&error.source, &error.key.source))
			rewrite_outer(skb, &error, &to.address, 1);
	} else {
		rewrite_inner(skb, &error, &to, 1);
		rewrite_outer(skb, &error, &to.address, 0);
	}
	return TC_ACT_OK;
}

// Gives the client a port of the node that no other flow to this endpoint has; whether there was one.
separate int masquerade(const struct packet *packet, const struct endpoint *endpoint)
{
	struct flow flow = {.seen = now_ns()};
	struct flow_key key = {};
	struct node *node = this_node();

	if (!packet || !endpoint || !node)
		return 0;
	key.protocol = packet->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = node->addresses[packet->is_ipv6 ? 1 : 0];
	flow.to.address = packet->key.source;
	flow.to.port = packet->key.source_port;
	for (int tries = 0; tries < PORT_TRIES; tries++) {
		__u16 port = FIRST_PORT + random32() % PORTS;

		key.destination_port = big16(port);
		if (map_update(&flows, &key, &flow, BPF_NOEXIST))
			continue;
		flow.to.address = key.destination;
		flow.to.port = key.destination_port;
		key.source = packet->key.source;
		key.source_port = packet->key.source_port;
		key.destination = endpoint->address;
		key.destination_port = endpoint->port;
		key.leaving = 1;
		return !map_update(&flows, &key, &flow, BPF_ANY);
	}
	return 0;
}

// Beside OTHERS_LEFT.
#define START_MASQUERADED 1

// Writes down where this flow goes and how its answers are translated back.
separate int start_flow(const struct packet *packet, const struct endpoint *endpoint, __u32 id, __u32 how)
{
	struct flow flow = {.id = id, .seen = now_ns()};
	struct flow_key key = {};

	if (!packet || !endpoint)
		return 0;
	if (how & START_MASQUERADED && !masquerade(packet, endpoint))
		return 0;
	key.protocol = packet->key.protocol;
	key.source = endpoint->address;
	key.source_port = endpoint->port;
	key.destination = packet->key.source;
	key.destination_port = packet->key.source_port;
	key.leaving = 1;
	flow.to.address = packet->key.destination;
	flow.to.port = packet->key.destination_port;
	flow.flags = ANSWER | (how & OTHERS_LEFT);
	if (map_update(&flows, &key, &flow, BPF_ANY))
		return 0;
	key = packet->key;
	flow.to = *endpoint;
	flow.flags = PICKED;
	return !map_update(&flows, &key, &flow, BPF_ANY);
}

// Whether a packet goes on in its flow, or is the first of a new one that looks the same.
inlined int goes_on(const struct packet *packet, struct flow *flow)
{
	__u64 now = now_ns();
	__u64 idle = now - flow->seen;

	if (flow->flags & PICKED) {
		if (packet->key.protocol == IPPROTO_UDP) {
			if (idle > UDP_IDLE || !is_member(flow->id, 1, &flow->to))
				return 0;
		} else if (is_first_syn(packet) && (!(flow->flags & ANSWERED) || idle > SYN_REPEATS)) {
			return 0;
		}
	}
	flow->seen = now;
	return 1;
}

inlined int may_use(const struct frontend *frontend, const union address *source)
{
	struct source_key key = {.prefix_length = 32 + 128, .id = frontend->id};

	set_address(key.address, source);
	return !(frontend->flags & FIREWALL) || map_lookup(&sources, &key);
}

// Its endpoint did not answer: affinity must not lead there again.
inlined void forget_client(__u32 list, const union address *client)
{
	struct affinity_key key = {.list = list};

	set_address(key.client, client);
	map_delete(&affinities, &key);
}

SEC("classifier/arriving") int arriving(struct __sk_buff *skb)
{
	struct endpoint endpoint = {};
	struct frontend *frontend;
	struct packet packet;
	struct flow *flow;
	struct node *node;
	struct endpoint tried = {};
	__u32 list, count, how = 0;
	int in_pods, again = 0;

	if (!parse(skb, &packet, 0))
		return translate_error(skb, 0);
	flow = map_lookup(&flows, &packet.key);
	if (flow && goes_on(&packet, flow)) {
		endpoint = flow->to;
		return rewrite(skb, &packet, &endpoint, 0);
	}
	if (flow && packet.key.protocol == IPPROTO_TCP && !(flow->flags & ANSWERED) && now_ns() - flow->seen < SYN_REPEATS) {
		again = 1;
		tried = flow->to;
	}
	node = this_node();
	if (!node)
		return TC_ACT_OK;
	// No connection starts in its middle: one to a Service is another mode's, which translates it later. And it spares the
	// packets between pods the next questions.
	if (packet.key.protocol == IPPROTO_TCP && !is_first_syn(&packet))
		return TC_ACT_OK;
	frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
	if (!frontend) {
		// An address of a Service that nobody has: forwarded, it would come back.
		int nobodys = in_networks(&packet.key.destination, node->services, node->service_networks);

		return nobodys ? TC_ACT_SHOT : TC_ACT_OK;
	}
	in_pods = in_networks(&packet.key.source, node->pods, node->pod_networks);
	if (!may_use(frontend, &packet.key.source))
		return TC_ACT_SHOT;
	list = in_pods ? frontend->list : frontend->outside_list;
	count = in_pods ? frontend->count : frontend->outside_count;
	if (!count) {
		if (!(frontend->flags & REFUSED))
			return TC_ACT_SHOT;
		// Nobody can listen on port 0: the node itself refuses, and its answer is translated back.
		endpoint.address = node->addresses[packet.is_ipv6 ? 1 : 0];
	} else {
		if (again)
			forget_client(list, &packet.key.source);
		if (!pick(list, count, frontend->affinity_seconds, &packet.key.source, &endpoint))
			return TC_ACT_SHOT;
		for (int more = 0; again && more < OTHER_PICKS; more++) {
			if (endpoint.port != tried.port || !same_address(&endpoint.address, &tried.address))
				break;
			forget_client(list, &packet.key.source);
			if (!pick(list, count, frontend->affinity_seconds, &packet.key.source, &endpoint))
				return TC_ACT_SHOT;
		}
		if (frontend->flags & MASQUERADE ||
		    (frontend->flags & MASQUERADE_OUTSIDE && !in_pods && node->has_pods[packet.is_ipv6 ? 1 : 0]) ||
		    same_address(&endpoint.address, &packet.key.source))
			how |= START_MASQUERADED;
		// Once: if the second refuses, too, the client is told.
		if (count > 1 && !again)
			how |= OTHERS_LEFT;
	}
	// A full table: the client asks again.
	if (!start_flow(&packet, &endpoint, frontend->id, how))
		return TC_ACT_SHOT;
	return rewrite(skb, &packet, &endpoint, 0);
}

// Tells the client's direction that its endpoint has answered.
inlined void note_answer(const struct packet *packet, struct flow *answer)
{
	struct flow_key key = {.protocol = packet->key.protocol};
	struct flow *flow;

	if (answer->flags & ANSWERED || packet->tcp_flags & TCP_RST)
		return;
	answer->flags |= ANSWERED;
	key.source = packet->key.destination;
	key.source_port = packet->key.destination_port;
	key.destination = answer->to.address;
	key.destination_port = answer->to.port;
	flow = map_lookup(&flows, &key);
	if (flow)
		flow->flags |= ANSWERED;
}

SEC("classifier/leaving") int leaving(struct __sk_buff *skb)
{
	struct endpoint endpoint;
	struct packet packet;
	struct flow *flow;

	if (!parse(skb, &packet, 1))
		return translate_error(skb, 1);
	flow = map_lookup(&flows, &packet.key);
	if (flow) {
		flow->seen = now_ns();
		// The client repeats its SYN, which then goes to another endpoint.
		if (packet.tcp_flags & TCP_RST && (flow->flags & (OTHERS_LEFT | ANSWERED)) == OTHERS_LEFT)
			return TC_ACT_SHOT;
		if (flow->flags & ANSWER)
			note_answer(&packet, flow);
		endpoint = flow->to;
		return rewrite(skb, &packet, &endpoint, 1);
	}
	// From a socket of this node that was left alone: to an address that only others may use, or that nobody has.
	if (!skb->ingress_ifindex) {
		struct frontend *frontend;
		struct node *node = this_node();

		if (!node)
			return TC_ACT_OK;
		frontend = find_frontend(&packet.key.destination, packet.key.destination_port, packet.key.protocol);
		if (frontend ? frontend->flags & FIREWALL || !frontend->count
			     : in_networks(&packet.key.destination, node->services, node->service_networks))
			return TC_ACT_SHOT;
	}
	return TC_ACT_OK;
}
