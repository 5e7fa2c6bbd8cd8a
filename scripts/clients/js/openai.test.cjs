// openai for JavaScript, against the server that SERVER names.
const assert = require('node:assert/strict')
const test = require('node:test')
const { OpenAI } = require('openai')

const { call, functions, near, say, user, COLOURS } = require('./says.cjs')

const client = new OpenAI({ baseURL: process.env.SERVER + '/v1', apiKey: 'none', maxRetries: 0 })
const chat = (text, options) =>
  client.chat.completions.create({ model: 'one', messages: user(text), ...options })

test('chat', async () => {
  const answer = await chat('Hello, you.')
  assert.equal(answer.choices[0].message.content, 'Hello, you.')
  assert.equal(answer.choices[0].finish_reason, 'stop')
  assert.equal(answer.usage.completion_tokens, 'Hello, you.'.length)
})

test('stream', async () => {
  let text = ''
  let usage
  for await (const chunk of await chat('Grüße', { stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? ''
    usage = chunk.usage ?? usage
  }
  assert.equal(text, 'Grüße')
  assert.equal(usage.completion_tokens, Buffer.byteLength('Grüße'))
})

test('the helper of streams', async () => {
  const runner = client.chat.completions.stream({ model: 'one', messages: user('abc') })
  assert.equal(await runner.finalContent(), 'abc')
})

test('tools', async () => {
  const answer = await chat(call('weather', { city: 'Oslo' }) + call('clock', {}), { tools: functions })
  const told = (calls) => calls.map((call) => [call.function.name, JSON.parse(call.function.arguments)])
  assert.deepEqual(told(answer.choices[0].message.tool_calls), [['weather', { city: 'Oslo' }], ['clock', {}]])
  const runner = client.chat.completions.stream({
    model: 'one', messages: user(call('weather', { city: 'Oslo' })), tools: functions,
  })
  const message = await runner.finalMessage()
  assert.deepEqual(told(message.tool_calls), [['weather', { city: 'Oslo' }]])
  const held = await chat('No.', { tools: functions, tool_choice: { type: 'function', function: { name: 'clock' } } })
  assert.deepEqual(told(held.choices[0].message.tool_calls), [['clock', {}]])
})

test('tools that the helper runs', async () => {
  const asked = []
  const weather = (given) => asked.push(given) && say('It rains.')
  const tools = [{ type: 'function', function: { ...functions[0].function, function: weather, parse: JSON.parse } }]
  const runner = client.chat.completions.runTools({
    model: 'one', messages: user(call('weather', { city: 'Oslo' })), tools,
  })
  assert.equal(await runner.finalContent(), 'It rains.')
  assert.deepEqual(asked, [{ city: 'Oslo' }])
})

test('forms', async () => {
  const json_schema = { name: 'sky', strict: true, schema: COLOURS }
  const answer = await chat('No.', { response_format: { type: 'json_schema', json_schema } })
  assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)), ['sky', 'rains'])
})

test('embeddings', async () => {
  for (const encoding_format of [undefined, 'float']) {
    const { data } = await client.embeddings.create({ model: 'one', input: ['aei', 'oo'], encoding_format })
    near(data[0].embedding, [1, 1, 1, 0, 0])
    near(data[1].embedding, [0, 0, 0, 1, 0])
  }
})

test('responses', async () => {
  const answer = await client.responses.create({ model: 'one', input: say('Hello.') })
  assert.equal(answer.output_text, 'Hello.')
  const stream = client.responses.stream({ model: 'one', input: say('Hello.') })
  let text = ''
  for await (const event of stream) text += event.type === 'response.output_text.delta' ? event.delta : ''
  assert.equal(text, 'Hello.')
  assert.equal((await stream.finalResponse()).status, 'completed')
})

test('texts and models', async () => {
  const answer = await client.completions.create({ model: 'one', prompt: 'abc', max_tokens: 3 })
  assert.equal(answer.choices[0].text, 'def')
  const ids = []
  for await (const model of client.models.list()) ids.push(model.id)
  assert.deepEqual(ids.sort(), ['fill', 'one', 'plain', 'two'])
})

test('errors', async () => {
  await assert.rejects(client.chat.completions.create({ model: 'three', messages: user('x') }), OpenAI.NotFoundError)
  await assert.rejects(chat('x', { temperature: -1 }), OpenAI.BadRequestError)
  await assert.rejects(chat('x'.repeat(5000)), { code: 'context_length_exceeded' })
  const stream = await chat('abc FAIL~ NOW', { stream: true })
  await assert.rejects(async () => {
    for await (const chunk of stream) assert.ok(chunk)
  }, /the script says so/)
})
