// Where events come from: `GET /kv/events` read with fetch, because EventSource can send no Authorization header.

import { Gap } from './model.js'

const FIRST_WAIT = 500, LONGEST_WAIT = 10_000 // ms between attempts
const SILENCE = 45_000 // ms without a byte, pings included, after which the connection counts as lost
const ME_INTERVAL = 400 // ms: /kv/me allows four reads a second

/** Cuts a text stream into server-sent events: `push` returns the ones that are complete. */
export class EventStreamParser {
  constructor() {
    this._rest = ''
    this._new()
  }

  _new() {
    this._event = { type: 'message', id: null, data: [] }
  }

  push(text) {
    const lines = (this._rest + text).split(/\r\n|\n|\r(?!$)/)
    this._rest = lines.pop()
    const events = []
    for (const line of lines) {
      if (line) this._line(line)
      else this._dispatch(events)
    }
    return events
  }

  _line(line) {
    const colon = line.indexOf(':')
    if (colon === 0) return // a comment, sent to keep the connection open
    const name = colon < 0 ? line : line.slice(0, colon)
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '')
    if (name === 'event') this._event.type = value
    else if (name === 'id') this._event.id = value
    else if (name === 'data') this._event.data.push(value)
  }

  _dispatch(events) {
    const { type, id, data } = this._event
    if (data.length) events.push({ type, id, data: data.join('\n') })
    this._new()
  }
}

/**
 * Keeps a model at the server's state.
 *
 * Reports `onStatus('connecting' | 'live' | 'paused' | 'off', detail)`, and calls `onSnapshot` and `onDelta` after the
 * model has moved. It reads only while started, not paused, and the page is visible: a browser opens no more than six
 * connections to a host over HTTP/1.1, and every tab wants some.
 */
export class Feed {
  constructor({ base, model, viewer, onStatus, onSnapshot = () => {}, onDelta = () => {} }) {
    Object.assign(this, { base, model, viewer, onStatus, onSnapshot, onDelta })
    this.paused = false
    this._lastId = null
    this._wait = FIRST_WAIT
    this._run = null // AbortController of the attempt that is under way
    this._visible = () => this._update()
  }

  start() {
    this._started = true
    document.addEventListener('visibilitychange', this._visible)
    this._update()
  }

  stop() {
    this._started = false
    document.removeEventListener('visibilitychange', this._visible)
    this._update()
  }

  setPaused(paused) {
    this.paused = paused
    this._update()
  }

  /**
   * The page says who the viewer is. What is shown may depend on it, except where everybody sees everything; a stream
   * that was asked for in another name starts again.
   */
  viewerChanged() {
    const token = this.viewer()?.token
    if (!this.model.loaded || this.model.scope === 'full' || token === this._sent || token === this._refused) return
    this._lastId = null
    this._close()
    this._update()
  }

  _update() {
    const wanted = this._started && !this.paused && !document.hidden
    if (wanted && !this._run) this._open()
    if (!wanted && this._run) this._close()
    if (this.paused) this.onStatus('paused', '')
  }

  _close() {
    this._run?.abort()
    this._run = null
  }

  async _open() {
    const run = (this._run = new AbortController())
    this._wait = FIRST_WAIT
    while (!run.signal.aborted) {
      this.onStatus('connecting', '')
      const verdict = await this._attempt(run.signal)
      if (run.signal.aborted) return
      if (verdict.off) {
        this.onStatus('off', verdict.detail)
        return
      }
      this.onStatus('connecting', verdict.detail)
      await sleep(Math.max(verdict.after, this._wait * (0.75 + Math.random() / 2)), run.signal)
      this._wait = Math.min(this._wait * 2, LONGEST_WAIT)
    }
  }

  /** One connection, from its request to its end. Returns `{off, detail, after}`: whether and when to try again. */
  async _attempt(signal) {
    const attempt = new AbortController()
    const abort = () => attempt.abort()
    signal.addEventListener('abort', abort)
    const watch = new Watchdog(SILENCE, abort)
    try {
      const response = await this._request(attempt.signal)
      // A token that a restarted server does not know: watch as a stranger until the page has a new one.
      if (response.status === 401) this._refused = this.viewer()?.token
      const refused = await refusal(response)
      if (refused) return refused
      if (this.model.loaded && this._lastId) this._live()
      await this._read(response.body, watch, attempt.signal)
      return { detail: 'The server ended the stream', after: 0 }
    } catch (error) {
      return this._failed(error, signal)
    } finally {
      watch.end()
      attempt.abort()
      signal.removeEventListener('abort', abort)
    }
  }

  _failed(error, signal) {
    if (signal.aborted || error.name === 'AbortError' || error instanceof TypeError) {
      return { detail: 'The server does not answer', after: 0 }
    }
    this._lastId = null // whatever it was, a whole snapshot mends it
    if (!(error instanceof Gap)) console.error(error)
    return { detail: 'Some events were missed: asking for the whole state', after: 0 }
  }

  _request(signal) {
    const viewer = this.viewer()
    const known = viewer?.token !== this._refused
    this._sent = viewer?.token
    const headers = { Accept: 'text/event-stream', ...(known ? authorization(viewer) : {}) }
    if (this._lastId) headers['Last-Event-ID'] = this._lastId
    return fetch(new URL('kv/events', this.base), { headers, signal, cache: 'no-store' })
  }

  async _read(body, watch, signal) {
    const parser = new EventStreamParser()
    const reader = body.pipeThrough(new TextDecoderStream()).getReader()
    for (;;) {
      const { value, done } = await reader.read()
      if (done || signal.aborted) return
      watch.alive()
      for (const event of parser.push(value)) {
        this._take(event)
        if (signal.aborted) return
      }
    }
  }

  _take({ type, id, data }) {
    if (type === 'snapshot') {
      this.model.load(JSON.parse(data))
      this._stale = false
      this._lastId = id
      this.onSnapshot()
      this._live()
      return this.viewerChanged() // it may have, since this stream was asked for
    } else if (type === 'resync') {
      this._stale = true // what comes before the next snapshot does not fit
      this._lastId = null
      return
    } else if (type === 'delta' && !this._stale) {
      if (!this.model.loaded) throw new Gap('events came before any snapshot')
      const delta = JSON.parse(data)
      this.model.applyDelta(delta)
      this.onDelta(delta)
    } else {
      return
    }
    if (id) this._lastId = id
    this._live()
  }

  _live() {
    this._wait = FIRST_WAIT
    this.onStatus('live', '')
  }
}

let nextRead = 0 // time of the next read of /kv/me that any panel of this page may make

/** The viewer's own tokens from `/kv/me`, read again when `poke` says that they changed, at most four times a second. */
export class OwnTokens {
  constructor({ base, viewer, onTokens }) {
    Object.assign(this, { base, viewer, onTokens })
    this._wanted = this._busy = this._stopped = false
  }

  stop() {
    this._stopped = true
  }

  poke() {
    this._wanted = true
    if (!this._busy) this._loop()
  }

  async _loop() {
    this._busy = true
    while (this._wanted && !this._stopped && this._isKnown()) {
      const now = performance.now()
      nextRead = Math.max(now, nextRead) + ME_INTERVAL
      await sleep(nextRead - now - ME_INTERVAL)
      this._wanted = false
      await this._read()
    }
    this._busy = false
  }

  _isKnown() {
    const token = this.viewer()?.token
    return Boolean(token) && token !== this._refused
  }

  async _read() {
    const asked = this.viewer()
    try {
      const response = await fetch(new URL('kv/me', this.base), { headers: authorization(asked), cache: 'no-store' })
      if (response.status === 401) this._refused = asked.token
      if (!response.ok) return
      const body = await response.json()
      if (!this._stopped && this.viewer()?.token === asked.token) this.onTokens(body)
    } catch (error) {
      if (!(error instanceof TypeError)) throw error // no connection: the event stream says so already
    }
  }
}

function authorization(viewer) {
  return viewer?.token ? { Authorization: `Bearer ${viewer.token}` } : {}
}

/** What a response that is no stream means, or null for one that is. */
async function refusal(response) {
  if (response.ok && response.body) return null
  const detail = await reason(response)
  const after = 1000 * (Number(response.headers.get('Retry-After')) || 0)
  return { off: response.status === 404 || response.status === 403, detail, after }
}

async function reason(response) {
  try {
    const body = await response.json()
    return String(body.error?.message ?? body.detail ?? `The server answers ${response.status}`)
  } catch {
    return `The server answers ${response.status}`
  }
}

class Watchdog {
  constructor(ms, bark) {
    Object.assign(this, { ms, bark })
    this.alive()
  }

  alive() {
    clearTimeout(this._timer)
    this._timer = setTimeout(this.bark, this.ms)
  }

  end() {
    clearTimeout(this._timer)
  }
}

function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms)
    signal?.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true })
  })
}
