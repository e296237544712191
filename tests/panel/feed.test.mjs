import assert from 'node:assert/strict'
import { test } from 'node:test'

import { EventStreamParser, Feed, OwnTokens } from '../../static/feed.js'
import { Model } from '../../static/model.js'

// -- a browser and a server, as far as the feed needs them ----------------------------------------------------------

globalThis.document = Object.assign(new EventTarget(), { hidden: false })

function show(visible) {
  document.hidden = !visible
  document.dispatchEvent(new Event('visibilitychange'))
}

const servers = new Map()
globalThis.fetch = async (url, { headers, signal }) => servers.get(url.host).answer(url, headers, signal)

class Server {
  constructor(name) {
    this.base = new URL(`http://${name}/`)
    this.asked = []
    this.status = 200
    this.first = () => message('snapshot', 'e-10', snapshot())
    servers.set(name, this)
  }

  answer(url, headers, signal) {
    this.asked.push({ path: url.pathname, ...headers })
    const refused = this.refuses?.(headers)
    if (refused) return new Response(JSON.stringify({ error: { message: 'not now' } }), { status: refused })
    if (url.pathname === '/kv/me') return Response.json({ session: 3, sequences: [] })
    const body = new ReadableStream({ start: (stream) => (this.stream = stream) })
    signal.addEventListener('abort', () => this.stream.error(new DOMException('aborted', 'AbortError')))
    const text = this.first(headers)
    if (text) this.send(text)
    return new Response(body)
  }

  send(text) {
    this.stream.enqueue(new TextEncoder().encode(text))
  }

  async asks(times) {
    await until(() => this.asked.length >= times)
  }
}

function message(type, id, body) {
  return `${id ? `id: ${id}\n` : ''}event: ${type}\ndata: ${JSON.stringify(body)}\n\n`
}

function snapshot(seq = 10) {
  return {
    v: 1, epoch: 'e', seq, block_size: 4, num_blocks: 2, bytes_per_block: 0, max_model_len: 8, scope: 'full', sharing: 'all',
    blocks: {}, counters: {}, system: [], sessions: [],
    pool: { state: btoa('\0\0'), ref: btoa('\0\0\0\0'), fill: btoa('\0\0') },
  }
}

function delta(...seqs) {
  const events = seqs.map((seq) => ({ seq, kind: 'publish', reason: 'test' }))
  return message('delta', `e-${seqs.at(-1)}`, { seq: [seqs[0], seqs.at(-1)], time: 0, events })
}

async function until(happened) {
  for (let i = 0; i < 300; i++) {
    if (happened()) return
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  assert.fail('it did not happen within 3 s')
}

function started(server, viewer = null) {
  const model = new Model()
  const states = []
  const feed = new Feed({ base: server.base, model, viewer: () => viewer, onStatus: (state) => states.push(state) })
  feed.start()
  return { feed, model, states }
}

// -- the parser -------------------------------------------------------------------------------------------------------

test('the parser does not care where the stream is cut', () => {
  const text = ': ping\n\nid: e-1\nevent: delta\ndata: {"a":\ndata: 1}\n\nevent: resync\r\ndata: {}\r\n\r\n'
  const whole = new EventStreamParser().push(text)
  assert.deepEqual(whole, [
    { type: 'delta', id: 'e-1', data: '{"a":\n1}' },
    { type: 'resync', id: null, data: '{}' },
  ])
  const parser = new EventStreamParser()
  assert.deepEqual([...text].flatMap((character) => parser.push(character)), whole)
})

// -- the feed ---------------------------------------------------------------------------------------------------------

test('it takes a snapshot and follows; after a break it asks for what came since', async () => {
  const server = new Server('break')
  const { feed, model, states } = started(server)
  await until(() => model.loaded)
  server.send(delta(11, 12))
  await until(() => model.seq === 12)
  server.first = () => delta(13)
  server.stream.close()
  await until(() => model.seq === 13)
  assert.equal(server.asked[0]['Last-Event-ID'], undefined)
  assert.equal(server.asked[1]['Last-Event-ID'], 'e-12')
  assert.equal(states.at(-1), 'live')
  feed.stop()
})

test('after a gap it asks for everything', async () => {
  const server = new Server('gap')
  const { feed, model } = started(server)
  await until(() => model.loaded)
  server.first = () => message('snapshot', 'e-20', snapshot(20))
  server.send(delta(13))
  await until(() => model.seq === 20)
  assert.equal(server.asked[1]['Last-Event-ID'], undefined)
  feed.stop()
})

test('after resync nothing counts before the snapshot', async () => {
  const server = new Server('resync')
  const { feed, model } = started(server)
  await until(() => model.loaded)
  server.send(message('resync', null, {}) + delta(17) + message('snapshot', 'e-30', snapshot(30)) + delta(31))
  await until(() => model.seq === 31)
  assert.equal(server.asked.length, 1)
  feed.stop()
})

test('it sends the view token; one that is not known any more it leaves out', async () => {
  const server = new Server('token')
  server.refuses = (headers) => (headers.Authorization ? 401 : 0)
  const { feed, model } = started(server, { token: 'secret' })
  await until(() => model.loaded)
  assert.deepEqual(server.asked.map((asked) => asked.Authorization), ['Bearer secret', undefined])
  feed.stop()
})

test('a viewer who becomes known gets a stream of their own, where it makes a difference', async () => {
  for (const [scope, asks] of [['aggregate', 2], ['full', 1]]) {
    const server = new Server(`viewer-${scope}`)
    server.first = () => message('snapshot', 'e-10', { ...snapshot(), scope })
    const viewer = {}
    const { feed, model } = started(server, viewer)
    await until(() => model.loaded)
    viewer.token = 'secret'
    feed.viewerChanged()
    await new Promise((resolve) => setTimeout(resolve, 50))
    assert.equal(server.asked.length, asks)
    assert.equal(server.asked.at(-1)['Last-Event-ID'], undefined)
    feed.stop()
  }
})

test('a viewer who becomes known before the first snapshot is asked for at once', async () => {
  const server = new Server('early')
  const viewer = {}
  server.first = (headers) => {
    viewer.token = 'secret'
    return message('snapshot', headers.Authorization ? 'mine-5' : 'e-10', { ...snapshot(), scope: 'self' }) + delta(11)
  }
  const { feed } = started(server, viewer)
  await server.asks(2)
  await until(() => feed._lastId === 'e-11')
  assert.deepEqual(server.asked.map((asked) => asked.Authorization), [undefined, 'Bearer secret'])
  assert.equal(server.asked[1]['Last-Event-ID'], undefined)
  feed.stop()
})

test('a server without the routes is not asked again', async () => {
  const server = new Server('off')
  server.refuses = () => 404
  const { states } = started(server)
  await until(() => states.at(-1) === 'off')
  assert.equal(server.asked.length, 1)
})

test('a server that is not ready is asked again', async () => {
  const server = new Server('loading')
  server.refuses = () => (server.asked.length < 2 ? 503 : 0)
  const { feed, model } = started(server)
  await until(() => model.loaded)
  feed.stop()
})

test('while paused, and while the page is hidden, no connection is open', async () => {
  const server = new Server('quiet')
  const { feed, model, states } = started(server)
  await until(() => model.loaded)
  feed.setPaused(true)
  assert.equal(states.at(-1), 'paused')
  assert.throws(() => server.send(delta(11)))
  server.first = () => delta(11)
  feed.setPaused(false)
  await until(() => model.seq === 11)
  show(false)
  assert.throws(() => server.send(delta(12)))
  server.first = () => delta(12)
  show(true)
  await until(() => model.seq === 12)
  assert.equal(server.asked.at(-1)['Last-Event-ID'], 'e-11')
  feed.stop()
  assert.throws(() => server.send(delta(13)))
})

// -- own tokens -------------------------------------------------------------------------------------------------------

test('own tokens are read at most four times a second, and once more after the last change', async () => {
  const server = new Server('me')
  const bodies = []
  const own = new OwnTokens({ base: server.base, viewer: () => ({ token: 'secret' }), onTokens: (body) => bodies.push(body) })
  for (let i = 0; i < 60; i++) {
    own.poke()
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  await until(() => bodies.length === server.asked.length && !own._busy)
  assert.ok(bodies.length >= 3 && bodies.length <= 4, `${bodies.length} reads in 0.6 s`)
  own.stop()
})

test('own tokens of a stranger, or of a token that is not known, are not asked for again', async () => {
  const server = new Server('stranger')
  server.refuses = () => 401
  let viewer = null
  const own = new OwnTokens({ base: server.base, viewer: () => viewer, onTokens: () => assert.fail() })
  own.poke()
  assert.equal(server.asked.length, 0)
  viewer = { token: 'old' }
  own.poke()
  await until(() => server.asked.length === 1 && !own._busy)
  own.poke()
  await new Promise((resolve) => setTimeout(resolve, 50))
  assert.equal(server.asked.length, 1)
})
